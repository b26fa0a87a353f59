"""Options of `moekit.jobs.slim`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from moekit.jobs.options.base import CommandLine, ModelRef, PlanRef
from moekit.jobs.options.inplace import InPlaceOptions


class SlimOptions(InPlaceOptions):
    """Make every expert narrower (`moekit methods slim`): the same class with smaller sizes, no expert dropped."""

    job: ClassVar[str] = "moekit.jobs.slim"
    kind: ClassVar[str] = "slim"
    budget: ClassVar[tuple[str, ...]] = ("width", "max_bytes")
    command: ClassVar[CommandLine] = CommandLine(
        help="Make every routed expert narrower: decide on text which neurons of each stay, refit what they put out, "
        "prove on held-out text what it costs, against neurons chosen by their weights and at random, write, and check "
        "what was written. The folder is of the same class with a smaller expert width: it loads wherever the model "
        "did. Methods: moekit methods slim.",
        writes="folder of the smaller model",
        arguments=("model",),
        instead="--plan",
        hidden=("write",),
        flags={"from_plan": "--from", "max_bytes": "--bytes"},
        examples=(
            "moekit slim ./moe --width 1/2 --data my-domain/ -o ./half",
            "moekit slim ./moe --width 384 --set score=output-norm --data demo --plan ./p.json -o ./narrow",
            "moekit slim ./moe --method slimmoe --bytes 12GiB --data demo -o ./small",
            "moekit slim ./moe --width 0.75 --method magnitude --set repair=none --heldout demo -o ./blind",
            "moekit slim ./healed --width 1/2 --set score=kd --teacher ./moe --data my-domain/ -o ./stage2",
            "moekit slim --from ./p.json -o ./again",
        ),
    )

    method: str | None = Field(default="slimmoe", description="which neurons stay; see moekit methods slim")
    width: int | float | str | None = Field(
        default=None, description="neurons that each expert keeps (384), or a share of them (1/2, 0.5; 1.0 is all)"
    )
    max_bytes: str | None = Field(
        default=None, description="instead: the widest experts with which the whole model is no larger (12GiB)"
    )
    teacher: ModelRef | None = Field(
        default=None,
        description="model that all stages are narrowed from, for --set score=kd: neurons count by how far it is",
    )
    from_plan: PlanRef | None = Field(
        default=None,
        description="carry this plan out again instead: the same neurons; where they are repaired, on the same text",
    )
    write: Literal["model", "plan"] = Field(default="model", description="write the narrow model, or the plan alone")
    proof: bool = Field(
        default=True, description="measure what it costs, against neurons chosen by weights and at random"
    )
