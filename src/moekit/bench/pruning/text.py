"""As much of a text as a bench wants, evenly from its domains and from the whole length of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moekit.bench.pruning.result import Cut
from moekit.data.batches import TokenizedDocument, tokenize
from moekit.data.encoding import encode_document
from moekit.data.passages import FEW, passages
from moekit.data.text import Document
from moekit.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A domain of many documents gives some of them at this length rather than all of them cut to a few words.
LEAST = 256


@dataclass(frozen=True)
class Passage(TokenizedDocument):
    """A piece of a document.

    Attributes:
        origin: number of the document within its domain.
    """

    origin: int


def take_tokens(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, most: int | None
) -> list[TokenizedDocument]:
    """Tokenize documents until there are enough tokens, each domain giving an equal share where it has so many.

    Domains of few documents are cut into passages of some 2,000 characters, so that a book gives an interval at all. It
    is too narrow, as passages of one book resemble each other: `count` tells how many documents there are.

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
        pieces = _passages(found) if len(found) < FEW else list(enumerate(found))
        for number, ids in _fill([piece for _, piece in pieces], tokenizer, share):
            chosen.append(Passage(ids, found[0].domain, len(chosen), pieces[number][0]))
    if sum(len(document.ids) for document in chosen) < 2:
        raise BadData("the text has fewer than two tokens", hint="give more text: nothing can be predicted from this")
    return chosen


def count(documents: Sequence[TokenizedDocument]) -> list[Cut]:
    """How many documents each domain's texts are of; a text that is no passage is one of its own."""
    by_domain: dict[str, list[tuple[bool, int]]] = {}
    for document in documents:
        origin = (True, document.origin) if isinstance(document, Passage) else (False, document.index)
        by_domain.setdefault(document.domain, []).append(origin)
    return [Cut(domain=name, passages=len(all_), documents=len({*all_})) for name, all_ in by_domain.items()]


def _passages(documents: Sequence[Document]) -> list[tuple[int, Document]]:
    return [(number, passage) for number, document in enumerate(documents) for passage in passages(document)]


def _fill(pieces: Sequence[Document], tokenizer: PreTrainedTokenizerBase, share: int) -> list[tuple[int, list[int]]]:
    """Numbers and ids of pieces from everywhere in the text, until there are enough."""
    count = min(len(pieces), -(-share // LEAST))
    spread = [round(i * (len(pieces) - 1) / max(1, count - 1)) for i in range(count)]
    rest = sorted(set(range(len(pieces))) - set(spread))
    each = max(LEAST, -(-share // len(pieces)))
    taken: dict[int, list[int]] = {}
    left = share
    for number in [*spread, *rest]:
        if left < 2:
            break
        ids = encode_document(pieces[number], tokenizer, characters=16 * each)[: min(each, left)]
        if ids:
            taken[number], left = ids, left - len(ids)
    return sorted(taken.items())
