"""As many tokens of a text as are wanted: each domain gives an equal share, documents as much as they must.

What a domain or a document does not have, the others give. Of many documents some are read at a useful length, from
everywhere in the text, rather than all of them for a word or two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moekit._progress import Progress, track
from moekit.data.batches import TokenizedDocument, begun, tokenize
from moekit.data.encoding import Bos, beginning, encode_document
from moekit.data.text import Document
from moekit.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fewer tokens of a document say little of what the text is like.
USEFUL = 256
# Few tokens are longer: no need to tokenize a novel for its first page.
_CHARACTERS = 16


def take_shares(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    most: int | None,
    *,
    bos: Bos = "auto",
    progress: Progress | None = None,
) -> list[TokenizedDocument]:
    """Tokenize at most so many tokens, beginnings of documents among them.

    Args:
        documents: the text; their order gives the numbers.
        tokenizer: any tokenizer of transformers.
        most: tokens, at most; None for all.
        bos: see `moekit.data.encoding.beginning`.
        progress: told of each document.

    Returns:
        Documents in their order, cut where their share ends.

    Raises:
        BadData: fewer than two tokens, of which nothing can be predicted.
    """
    if most is None:
        return tokenize(documents, tokenizer, bos=bos, progress=progress)
    by_domain: dict[str, list[int]] = {}
    for number, document in enumerate(documents):
        by_domain.setdefault(document.domain, []).append(number)
    # Small domains first: what they leave is known when the larger ones are asked.
    order = sorted(by_domain.values(), key=lambda numbers: sum(len(documents[n].text) for n in numbers))
    taken: dict[int, list[int]] = {}
    left = most
    for place, numbers in enumerate(track(order, "tokenizing", progress)):
        chosen = [documents[n] for n in numbers]
        for at, ids in _fill(chosen, tokenizer, left // (len(order) - place), bos):
            taken[numbers[at]] = ids
            left -= len(ids)
    begins = beginning(tokenizer, bos)
    found = [begun(ids, documents[n].domain, n, begins) for n, ids in sorted(taken.items())]
    if sum(len(document.ids) for document in found) < 2:
        raise BadData("the text has fewer than two tokens", hint="give more text: nothing can be predicted from this")
    return found


def _fill(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, share: int, bos: Bos
) -> Iterator[tuple[int, list[int]]]:
    """Numbers of documents, and what is read of each, until there are enough tokens."""
    count = min(len(documents), max(1, -(-share // USEFUL)))
    spread = [round(i * (len(documents) - 1) / max(1, count - 1)) for i in range(count)]
    rest = sorted(set(range(len(documents))) - set(spread))
    left = share
    # Short ones first, so that long ones know what is left for them.
    for place, number in enumerate([*sorted(spread, key=lambda n: len(documents[n].text)), *rest]):
        if left < 1:
            return
        each = min(left, -(-left // (count - place)) if place < count else USEFUL)
        ids = encode_document(documents[number], tokenizer, bos=bos, characters=_CHARACTERS * each)
        if ids := ids[:each]:
            yield number, ids
            left -= len(ids)
