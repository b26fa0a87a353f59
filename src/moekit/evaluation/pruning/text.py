"""As much of a text as a bench wants, evenly from its domains and from the whole length of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moekit.data.batches import TokenizedDocument, tokenize
from moekit.data.split import excerpts
from moekit.data.text import Document
from moekit.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fewer documents than this in a domain tell no interval: they are cut into passages, which are then the units.
FEW = 16
PASSAGE_CHARACTERS = 2000
# A domain of many documents gives some of them at this length rather than all of them cut to a few words.
LEAST = 256


def take_tokens(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, most: int | None
) -> list[TokenizedDocument]:
    """Tokenize documents until there are enough tokens, each domain giving an equal share where it has so many.

    Domains of few documents are cut into passages of some 2,000 characters, so that a book counts as many units.

    Args:
        documents: the text.
        tokenizer: of the model.
        most: tokens, at most; None for all of the documents as they are.

    Raises:
        BadData: fewer than two tokens.
    """
    if most is None:
        return tokenize(documents, tokenizer)
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    share = max(2, most // max(1, len(by_domain)))
    chosen: list[TokenizedDocument] = []
    for found in by_domain.values():
        pieces = _passages(found) if len(found) < FEW else found
        for ids in _fill(pieces, tokenizer, share):
            chosen.append(TokenizedDocument(ids, found[0].domain, len(chosen)))
    if sum(len(document.ids) for document in chosen) < 2:
        raise BadData("the text has fewer than two tokens", hint="give more text: nothing can be predicted from this")
    return chosen


def _passages(documents: Sequence[Document]) -> list[Document]:
    return [
        Document(passage, document.domain, document.source)
        for document in documents
        for passage in excerpts(document.text, PASSAGE_CHARACTERS)
    ]


def _fill(pieces: Sequence[Document], tokenizer: PreTrainedTokenizerBase, share: int) -> list[list[int]]:
    """Ids of pieces from everywhere in the text, until there are enough."""
    count = min(len(pieces), -(-share // LEAST))
    spread = [round(i * (len(pieces) - 1) / max(1, count - 1)) for i in range(count)]
    rest = sorted(set(range(len(pieces))) - set(spread))
    each = max(LEAST, -(-share // len(pieces)))
    taken: dict[int, list[int]] = {}
    left = share
    for number in [*spread, *rest]:
        if left < 2:
            break
        text = pieces[number].text[: 16 * each]
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[: min(each, left)]
        if ids:
            taken[number], left = ids, left - len(ids)
    return [taken[number] for number in sorted(taken)]
