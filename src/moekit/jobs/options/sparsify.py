"""Options of `moekit.jobs.sparsify`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from moekit.jobs.options.base import CommandLine, ModelRef, PlanRef
from moekit.jobs.options.inplace import InPlaceOptions


class SparsifyOptions(InPlaceOptions):
    """Zero the weights of the experts that matter least (`moekit methods sparsify`); routers and biases stay."""

    job: ClassVar[str] = "moekit.jobs.sparsify"
    kind: ClassVar[str] = "sparsify"
    budget: ClassVar[tuple[str, ...]] = ("sparsity", "total", "original")
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

    method: str | None = Field(default=None, description="which weights go; see moekit methods sparsify")
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
    from_plan: PlanRef | None = Field(
        default=None, description="carry this plan out again instead: the same zeros without a text"
    )
    write: Literal["model", "plan"] = Field(default="model", description="write the sparse model, or the plan alone")
    proof: bool = Field(default=True, description="measure what it costs, against magnitudes at the same sparsity")

    @field_validator("settings")
    @classmethod
    def _pattern(cls, settings: dict[str, Any]) -> dict[str, Any]:
        # YAML reads 2:4 as a number to the base of 60, and m is below 60 wherever it does.
        found = settings.get("pattern")
        return settings | {"pattern": f"{found // 60}:{found % 60}"} if type(found) is int else settings
