"""How a changed checkpoint is written and proved."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.options.base import JobOptions


class WritingOptions(JobOptions):
    """How a pruned checkpoint is written and proved."""

    proof: bool = Field(default=True, description="measure what it costs, against frequency and random pruning")
    proof_tokens: int | None = Field(
        default=32768, ge=2, description="held-out tokens, at most, an equal share of each domain"
    )
    window: int | None = Field(
        default=None, ge=2, description="longest context of the proof in tokens (default: the model's, ≤ 1024)"
    )
    random_seeds: int = Field(default=1, ge=1, le=100, description="random choices that the proof compares with")
    stock_only: bool = Field(default=False, description="refuse what stock transformers does not load")
    mtp: Literal["drop", "keep", "prune"] = Field(
        default="drop",
        description="multi-token-prediction layers: leave them out, copy them, or cut them to as many experts, those "
        "that their own router gives the most weight on the text, behind the decoder as it was",
    )
    bos: Bos = Field(default="auto", description=BOS_HELP)
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)
