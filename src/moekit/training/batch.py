"""What a training step knows of one micro-batch, as objectives see it.

Legend: B rows, S positions, N tokens (B times S), V vocabulary, K entries kept of a teacher's distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopLogProbs:
    """A teacher's likeliest tokens of some positions.

    Attributes:
        ids_NK: int64, token ids, likeliest first.
        values_NK: fp32, their log-probabilities, normalised over the whole vocabulary.
    """

    ids_NK: Tensor
    values_NK: Tensor


class TeacherOutput(Protocol):
    """What a teacher says of a micro-batch; asked for some positions at a time, so that memory stays bounded."""

    @property
    def complete(self) -> bool:
        """Whether `at` gives logits over the whole vocabulary."""

    def at(self, positions_N: Tensor) -> Tensor | TopLogProbs:
        """Logits [N, V], or the likeliest tokens, of positions numbered row by row; without a gradient."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One micro-batch of one text.

    Attributes:
        ids_BS: token ids; None where the forward was given embeddings.
        mask_BS: the attention mask, 0 at padding; None without one.
        text: name of the text that its rows are from.
        step: optimizer steps done before this one.
        progress: share of the run that is done, 0 to 1.
        teacher: what the teacher says of it; None without a teacher.
    """

    ids_BS: Tensor | None = None
    mask_BS: Tensor | None = None
    text: str = "train"
    step: int = 0
    progress: float = 0.0
    teacher: TeacherOutput | None = None

    @property
    def shape(self) -> tuple[int, int] | None:
        """(B, S); None where neither ids nor mask are known."""
        known = self.ids_BS if self.ids_BS is not None else self.mask_BS
        return None if known is None or known.dim() != 2 else (known.shape[0], known.shape[1])


# Makes a micro-batch of the ids and the mask that a forward was given.
MakeBatch = Callable[[Tensor | None, Tensor | None], MicroBatch]
