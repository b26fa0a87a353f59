"""Whether token ids fit a model's embedding: asked before any forward pass, where it would be an index error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from moekit.errors import BadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that a tokenizer gives; -1 if it knows no token."""
    if hasattr(tokenizer, "get_vocab"):
        return max(tokenizer.get_vocab().values(), default=-1)
    return len(tokenizer) - 1


def embedding_rows(model: Any) -> int:
    """Token ids that a live model embeds."""
    return int(model.get_input_embeddings().weight.shape[0])


def output_size(model: Any) -> int:
    """Tokens that a live model predicts: rows of its output layer."""
    head = model.get_output_embeddings()
    return embedding_rows(model) if head is None else int(head.weight.shape[0])


def check(ids: PreTrainedTokenizerBase | Tensor | int, rows: int) -> None:
    """Refuse token ids that a model has no embedding for; on a GPU they would be an assertion of the device.

    Args:
        ids: a tokenizer, which may give any of its ids; token ids; or the largest of them.
        rows: rows of the input embedding (`embedding_rows`, or `vocab_size` of a config).

    Raises:
        BadConfig: naming the largest id and the rows.
    """
    lowest = 0
    if isinstance(ids, Tensor):
        lowest, largest = (int(ids.min()), int(ids.max())) if ids.numel() else (0, -1)
    else:
        largest = ids if isinstance(ids, int) else largest_id(ids)
    if lowest < 0:
        raise BadConfig(f"a token has the id {lowest}", hint="ids begin at 0")
    if largest >= rows:
        raise BadConfig(
            f"there are token ids up to {largest}, but the model embeds {rows} tokens",
            hint="use the model's own tokenizer, or resize the embedding (model.resize_token_embeddings) and train it",
        )
