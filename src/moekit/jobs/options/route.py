"""Options of `moekit.jobs.route`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from moekit.catalogue import MethodRecord
from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef, PlacementRef, TraceRef


def _example(record: MethodRecord) -> str:
    trace = " --trace ./trace" if record.needs else ""
    required = [name for name, field in getattr(record.cls, "model_fields", {}).items() if field.is_required()]
    options = "".join(f" --{name.replace('_', '-')} ..." for name in required)
    special = " --top-t 8" if record.name == "c2r" else ""
    return f"moekit route {record.name} ./moe{trace}{options}{special} -o ./routed"


class RouteOptions(JobOptions):
    """Let a routing policy (`moekit methods routing`) plan every layer."""

    job: ClassVar[str] = "moekit.jobs.route"
    command: ClassVar[CommandLine] = CommandLine(
        help="Plan a routing policy from a trace, by one of these methods, and write the model that routes by it.",
        writes="folder of the plan, or with --write model of the checkpoint",
        arguments=("model",),
        by_method="routing",
        example=_example,
    )

    model: ModelRef = Field(description="MoE: folder or hub id")
    method: str = Field(description="policy; see moekit methods routing")
    settings: dict[str, Any] = Field(default_factory=dict, description="the policy's own options")
    trace: TraceRef | None = Field(default=None, description="trace of this model, for policies that need statistics")
    placement: PlacementRef | None = Field(default=None, description="placement file, for policies that need devices")
    write: Literal["plan", "model"] = Field(default="plan", description="write the plan alone, or a model with it")
    drop_unknown: bool = Field(
        default=False,
        description="leave out what the source holds beyond the model, with write: model",
    )
