"""As many tokens of a text as are wanted: each domain gives an equal share, documents as much as they must.

What a domain or a document does not have, the others give. Of many documents some are read at a useful length, from
everywhere in the text, rather than all of them for a word or two.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moekit._progress import Progress, track
from moekit.data.batches import TokenizedDocument, begun, tokenize
from moekit.data.encoding import Bos, beginning, encode_document
from moekit.data.pictures import PictureReader, Shown
from moekit.data.text import Document
from moekit.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fewer tokens of a document say little of what the text is like.
USEFUL = 256
# Few tokens are longer: no need to tokenize a novel for its first page.
_CHARACTERS = 16
# More tokens than any text has.
_ALL = 1 << 60

logger = logging.getLogger(__name__)


def take_shares(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    most: int | None,
    *,
    bos: Bos = "auto",
    pictures: PictureReader | None = None,
    longest: int | None = None,
    progress: Progress | None = None,
) -> list[TokenizedDocument]:
    """Tokenize at most so many tokens, beginnings of documents among them.

    Args:
        documents: the text; their order gives the numbers.
        tokenizer: any tokenizer of transformers.
        most: tokens, at most; None for all.
        bos: see `moekit.data.encoding.beginning`.
        pictures: reads conversations with pictures, which are taken whole or not at all; None reads their words alone.
        longest: conversations with pictures of more tokens are left out, which is told.
        progress: told of each document.

    Returns:
        Documents in their order, cut where their share ends.

    Raises:
        BadData: fewer than two tokens, of which nothing can be predicted; or a picture that cannot be read.
    """
    shown = [n for n, document in enumerate(documents) if document.pictures] if pictures is not None else []
    if most is None and not shown:
        return tokenize(documents, tokenizer, bos=bos, progress=progress)
    reader = _Reader(tokenizer, bos, pictures, longest)
    by_domain: dict[str, list[int]] = {}
    for number, document in enumerate(documents):
        by_domain.setdefault(document.domain, []).append(number)
    # Small domains first: what they leave is known when the larger ones are asked.
    order = sorted(by_domain.values(), key=lambda numbers: sum(len(documents[n].text) for n in numbers))
    begins = beginning(tokenizer, bos)
    taken: dict[int, TokenizedDocument] = {}
    left = _ALL if most is None else most
    for place, numbers in enumerate(track(order, "tokenizing", progress)):
        for number, ids in _fill(documents, numbers, reader, left // (len(order) - place)):
            read = begun(ids, documents[number].domain, number, begins)
            taken[number] = dataclasses.replace(read, shown=reader.shown(documents[number]))
            left -= len(ids)
    reader.tell()
    found = [document for _, document in sorted(taken.items())]
    if sum(len(document.ids) for document in found) < 2:
        raise BadData("the text has fewer than two tokens", hint="give more text: nothing can be predicted from this")
    return found


class _Reader:
    """Token ids and pictures of documents, and what was left out."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, bos: Bos, pictures: PictureReader | None, longest: int | None
    ) -> None:
        self._tokenizer, self._bos, self._pictures, self._longest = tokenizer, bos, pictures, longest
        self._too_long: list[int] = []

    def shown(self, document: Document) -> Shown | None:
        """The pictures of a document, which is then taken whole or not at all."""
        return None if self._pictures is None or not document.pictures else Shown(self._pictures, document)

    def read(self, document: Document, most: int) -> list[int]:
        """Ids, at most so many of a document without pictures; none where it is left out."""
        if self._pictures is None or not document.pictures:
            return encode_document(document, self._tokenizer, bos=self._bos, characters=_CHARACTERS * most)[:most]
        ids = self._pictures.ids(document)
        if self._longest is not None and len(ids) > self._longest:
            self._too_long.append(len(ids))
            return []
        return ids

    def tell(self) -> None:
        """Say what was left out."""
        if self._too_long:
            logger.warning(
                "%d conversations with pictures are left out, as they are longer than a row of %s tokens; the longest "
                "has %d (--seq-len)",
                len(self._too_long),
                self._longest,
                max(self._too_long),
            )


def _fill(
    documents: Sequence[Document], numbers: Sequence[int], reader: _Reader, share: int
) -> Iterator[tuple[int, list[int]]]:
    """Numbers of documents of a domain, and what is read of each, until there are enough tokens."""
    count = min(len(numbers), max(1, -(-share // USEFUL)))
    spread = [numbers[round(i * (len(numbers) - 1) / max(1, count - 1))] for i in range(count)]
    rest = sorted(set(numbers) - set(spread))
    left = share
    # Short ones first, so that long ones know what is left for them.
    for place, number in enumerate([*sorted(spread, key=lambda n: len(documents[n].text)), *rest]):
        if left < 1:
            return
        each = min(left, -(-left // (count - place)) if place < count else USEFUL)
        ids = reader.read(documents[number], each)
        if ids and len(ids) <= left:
            yield number, ids
            left -= len(ids)
