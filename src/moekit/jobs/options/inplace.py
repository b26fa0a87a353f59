"""Options of the jobs that leave every expert and change its weights: `moekit.jobs.sparsify`, `.quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.options.base import JobOptions, ModelRef, PathText, PlanRef, TextRef


class InPlaceOptions(JobOptions):
    """Which model's weights change, what is decided on, and how the result is proved.

    Attributes:
        kind: of the methods.
        budget: fields that say how much changes.
    """

    kind: ClassVar[str] = ""
    budget: ClassVar[tuple[str, ...]] = ()

    model: ModelRef | None = Field(default=None, description="MoE: folder or hub id; a stored plan names its own")
    method: str | None = Field(default=None, description="what becomes of the weights; see moekit methods")
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's own knobs")
    data: TextRef | None = Field(default=None, description="text to decide on: file, folder, source, mix or hub id")
    heldout: TextRef | None = Field(
        default=None, description="text to prove the result on; by default a tenth of data, which is kept apart for it"
    )
    max_tokens: int | None = Field(default=65536, ge=1, description="tokens of data, at most, shared by its domains")
    seq_len: int = Field(default=512, ge=2, description="tokens a row; the model's limit if that is less")
    batch_size: int = Field(default=8, ge=1, description="rows a pass")
    plan: PathText | None = Field(default=None, description="also write what was decided to this file")
    from_plan: PlanRef | None = Field(
        default=None, description="carry this plan out again instead: the same weights without a text"
    )
    write: Literal["model", "plan"] = Field(default="model", description="write the changed model, or the plan alone")
    proof: bool = Field(
        default=True, description="measure what it costs, against the plainest method at the same budget"
    )
    proof_tokens: int | None = Field(
        default=32768, ge=2, description="held-out tokens, at most, an equal share of each domain"
    )
    window: int | None = Field(
        default=None, ge=2, description="longest context of the proof in tokens (default: the model's, ≤ 1024)"
    )
    bos: Bos = Field(default="auto", description=BOS_HELP)
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    def further_outputs(self, out: Path) -> tuple[Path, ...]:
        """The plan, where it is written beside a model."""
        return () if self.plan is None else (Path(self.plan),)
