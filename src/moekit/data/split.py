"""Which part of a text is for training and which is held out: fixed by order alone, never overlapping."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, TypeVar

Split = Literal["train", "heldout"]

HELDOUT_EVERY = 10
EXCERPT_BYTES = 12_000
# A remainder smaller than this is no text to learn from.
MIN_EXCERPT_BYTES = 200

T = TypeVar("T")


def cut_position(text: str, share: float) -> int:
    """Where to cut a text so that about `share` of its characters come before: at a blank line, line or word end."""
    target = int(len(text) * share)
    for mark, reach in (("\n\n", 2000), ("\n", 500), (" ", 100)):
        found = text.rfind(mark, target - min(reach, target // 4), target)
        if found > 0:
            return found + len(mark)
    return target


def split_texts(texts: Sequence[str], split: Split | None) -> list[tuple[int, str]]:
    """Take one side of a domain's documents.

    Of ten or more documents every tenth is held out whole, so that no held-out text continues a trained one; fewer
    are each cut after their first 90 %.

    Args:
        texts: all documents of one domain, in a fixed order.
        split: "train", "heldout" or None for everything.

    Returns:
        Pairs of document index and text.
    """
    if split is None:
        return list(enumerate(texts))
    held = split == "heldout"
    if len(texts) >= HELDOUT_EVERY:
        last = HELDOUT_EVERY - 1
        return [(i, text) for i, text in enumerate(texts) if (i % HELDOUT_EVERY == last) == held]
    parts = []
    for i, text in enumerate(texts):
        cut = cut_position(text, 1 - 1 / HELDOUT_EVERY)
        parts.append((i, text[cut:] if held else text[:cut]))
    return [(i, part) for i, part in parts if part.strip()]


def excerpts(text: str, size: int = EXCERPT_BYTES) -> list[str]:
    """Cut a long text into consecutive pieces of about `size` characters that together are the text."""
    pieces = []
    while len(text) > 2 * size:
        cut = cut_position(text, size / len(text))
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def truncate_bytes(text: str, limit: int) -> str:
    """The longest beginning of a text within `limit` UTF-8 bytes that ends at a line or word end where it can."""
    raw = text.encode()
    if len(raw) <= limit:
        return text
    head = raw[:limit].decode("utf-8", "ignore")
    return head[: cut_position(head, 1.0)] if head else head


def sample(texts: Sequence[tuple[T, str]], limit_bytes: int, seed: int) -> list[tuple[T, str]]:
    """Choose excerpts at random up to a number of bytes.

    Args:
        texts: pairs of anything and a document.
        limit_bytes: UTF-8 bytes in all; the last excerpt is shortened to fit.
        seed: of the choice; the same seed and limit give the same excerpts.

    Returns:
        Pairs of the document's mark and an excerpt, in random order.
    """
    pool = [(mark, piece) for mark, text in texts for piece in excerpts(text)]
    random.Random(seed).shuffle(pool)
    chosen: list[tuple[T, str]] = []
    for mark, piece in pool:
        piece = truncate_bytes(piece, limit_bytes)
        if not piece.strip() or (chosen and len(piece.encode()) < MIN_EXCERPT_BYTES):
            break
        chosen.append((mark, piece))
        limit_bytes -= len(piece.encode())
    return chosen
