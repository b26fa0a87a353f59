"""Questions made from real text where no others can be had: which of four passages really follows?

They are no published benchmark, and their tasks say so by name ("continuation-..."). The wrong passages are real too,
from elsewhere in the same kind of text, so that only what was read before tells them apart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from moekit.data.question_formats import Question
from moekit.data.text import Document
from moekit.errors import BadData

CONTEXT_CHARACTERS = 300
CHOICE_CHARACTERS = 60
CHOICES = 4
# Cutting only at single spaces keeps line ends and indentation from giving the answer away.
_CUT = re.compile(r"(?<=\S) (?=\S)")


def continuation_questions(documents: Sequence[Document], per_domain: int, seed: int) -> list[Question]:
    """Make questions, as many for each domain.

    Args:
        documents: held-out text.
        per_domain: questions of each domain.
        seed: of the choice of passages.

    Raises:
        BadData: a domain has too little text.
    """
    questions: list[Question] = []
    for domain in dict.fromkeys(d.domain for d in documents):
        chance = random.Random(f"{seed} {domain}")
        texts = [d.text for d in documents if d.domain == domain]
        cuts = [(t, cut.start()) for t, text in enumerate(texts) for cut in _CUT.finditer(text)]
        usable = [(t, at) for t, at in cuts if at >= CONTEXT_CHARACTERS and at + 2 * CHOICE_CHARACTERS <= len(texts[t])]
        if len(usable) < CHOICES * per_domain:
            raise BadData(
                f"the domain {domain!r} has too little text for {per_domain} questions",
                hint="ask for fewer, or give more text",
            )
        places = chance.sample(usable, CHOICES * per_domain)
        for start in range(0, len(places), CHOICES):
            questions.append(_question(texts, places[start : start + CHOICES], domain, chance))
    return questions


def _question(texts: list[str], places: list[tuple[int, int]], domain: str, chance: random.Random) -> Question:
    t, at = places[0]
    context = texts[t][at - CONTEXT_CHARACTERS : at]
    passages = [_passage(texts[t], at) for t, at in places]
    order = list(range(CHOICES))
    chance.shuffle(order)
    choices = tuple(passages[i] for i in order)
    return Question(context.partition(" ")[2], choices, order.index(0), f"continuation-{domain}")


def _passage(text: str, at: int) -> str:
    end = text.find(" ", at + CHOICE_CHARACTERS)
    return text[at : end if 0 < end <= at + 2 * CHOICE_CHARACTERS else at + CHOICE_CHARACTERS]
