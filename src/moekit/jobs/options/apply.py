"""Options of `moekit.jobs.apply`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from moekit.jobs.options.base import CommandLine, ModelRef, PlanRef, TextRef
from moekit.jobs.options.writing import WritingOptions


class ApplyOptions(WritingOptions):
    """Write the model that a pruning plan describes, or decide anew from the plan's scores with another budget."""

    job: ClassVar[str] = "moekit.jobs.apply"
    command: ClassVar[CommandLine] = CommandLine(
        help="Write the model that a pruning plan describes. With --keep, decide anew from the plan's scores: no new "
        "pass over the text.",
        writes="folder of the smaller model",
        arguments=("plan",),
        examples=("moekit apply ./p.json -o ./half", "moekit apply ./p.json --keep 0.75 -o ./three-quarters"),
    )

    plan: PlanRef = Field(description="plan file, or the folder of a prune step that wrote one")
    model: ModelRef | None = Field(default=None, description="MoE: folder or hub id; the plan's own by default")
    heldout: TextRef | None = Field(
        default=None, description="text to prove the result on; by default what was kept apart when the plan was made"
    )
    keep: int | float | str | None = Field(
        default=None, description="what stays instead: experts a layer, their fraction, or bytes; see moekit prune"
    )
    scope: Literal["uniform", "global"] | None = Field(
        default=None, description="equally many in each layer, or wherever they are worth most; the plan's by default"
    )
    least: int | None = Field(default=None, ge=1, description="fewest a layer keeps, with scope global")
    most: int | None = Field(default=None, ge=1, description="most a layer keeps, with scope global")
    other_weights: bool = Field(
        default=False, description="accept a model of the same shape and other weights, such as a quantized copy"
    )
