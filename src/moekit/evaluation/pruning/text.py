"""As much of a text as a bench wants, evenly from its domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moekit.data.batches import TokenizedDocument, tokenize
from moekit.data.text import Document
from moekit.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A domain of many documents gives few of them at some length rather than all of them cut to a few words.
LEAST = 256


def take_tokens(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, most: int | None
) -> list[TokenizedDocument]:
    """Tokenize documents until there are enough tokens, each domain giving as many as it can of an equal share.

    Args:
        documents: the text.
        tokenizer: of the model.
        most: tokens, at most; None for all.

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
        each, left = max(LEAST, -(-share // len(found))), share
        # As many as can be needed even where documents are short; the rest is not tokenized.
        for start in range(0, len(found), 64):
            if left < 2:
                break
            for tokenized in _tokenize(found[start : start + 64], tokenizer, each):
                if left < 2:
                    break
                kept = tokenized.ids[:left]
                chosen.append(TokenizedDocument(kept, tokenized.domain, len(chosen)))
                left -= len(kept)
    return chosen or tokenize(documents, tokenizer, most)


def _tokenize(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, each: int) -> list[TokenizedDocument]:
    """Like `tokenize`, but nothing is wrong with documents that hold nothing."""
    try:
        return tokenize(documents, tokenizer, each)
    except BadData:
        return []
