"""Options of `moekit.jobs.sparsify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef, PathText, PlanRef, TextRef


class SparsifyOptions(JobOptions):
    """Zero the weights of the experts that matter least (`moekit methods sparsify`); routers and biases stay."""

    job: ClassVar[str] = "moekit.jobs.sparsify"
    command: ClassVar[CommandLine] = CommandLine(
        help="Zero single weights of the experts: decide on text, prove what it costs on held-out text, against "
        "magnitudes at the same sparsity, write, and check what was written. Methods: moekit methods sparsify.",
        writes="folder of the smaller model",
        arguments=("model",),
        instead="--plan",
        hidden=("write",),
        flags={"from_plan": "--from"},
        examples=(
            "moekit sparsify ./moe --method wanda --sparsity 0.5 --data demo -o ./sparse",
            "moekit sparsify ./moe --method wanda --set pattern=2:4 --data my-domain/ -o ./two-of-four",
            "moekit sparsify ./pruned --method owl --total 0.65 --data demo --plan ./p.json -o ./sparse",
            "moekit sparsify --from ./p.json -o ./again",
        ),
    )

    model: ModelRef | None = Field(default=None, description="MoE: folder or hub id; a stored plan names its own")
    method: str | None = Field(default=None, description="which weights go; see moekit methods sparsify")
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's own knobs")
    sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="share of zeros among the routed experts' weights of this model"
    )
    total: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share that is to be gone, with whole experts or as zeros, of the routed experts' weights of the "
        "checkpoint that this model was pruned from",
    )
    original: ModelRef | None = Field(
        default=None, description="that checkpoint; found through the parents that records name by default"
    )
    data: TextRef | None = Field(default=None, description="text to decide on: file, folder, source, mix or hub id")
    heldout: TextRef | None = Field(
        default=None, description="text to prove the result on; by default a tenth of data, which is kept apart for it"
    )
    max_tokens: int | None = Field(default=65536, ge=1, description="tokens of data, at most, shared by its domains")
    seq_len: int = Field(default=512, ge=2, description="tokens a row; the model's limit if that is less")
    batch_size: int = Field(default=8, ge=1, description="rows a pass")
    plan: PathText | None = Field(default=None, description="also write what was decided to this file")
    from_plan: PlanRef | None = Field(
        default=None, description="carry this plan out again instead: the same zeros without a text"
    )
    write: Literal["model", "plan"] = Field(default="model", description="write the sparse model, or the plan alone")
    proof: bool = Field(default=True, description="measure what it costs, against magnitudes at the same sparsity")
    proof_tokens: int | None = Field(
        default=32768, ge=2, description="held-out tokens, at most, an equal share of each domain"
    )
    window: int | None = Field(
        default=None, ge=2, description="longest context of the proof in tokens (default: the model's, ≤ 1024)"
    )
    bos: Bos = Field(default="auto", description=BOS_HELP)
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    @field_validator("settings")
    @classmethod
    def _pattern(cls, settings: dict[str, Any]) -> dict[str, Any]:
        # YAML reads 2:4 as a number to the base of 60, and m is below 60 wherever it does.
        found = settings.get("pattern")
        return settings | {"pattern": f"{found // 60}:{found % 60}"} if type(found) is int else settings

    def further_outputs(self, out: Path) -> tuple[Path, ...]:
        """The plan, where it is written beside a model."""
        return () if self.plan is None else (Path(self.plan),)
