"""Options of `moekit.jobs.place`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef, PlacementRef, TraceRef


class PlaceOptions(JobOptions):
    """Place experts on devices, layer by layer, for several numbers of devices, and replay a trace to count rows."""

    job: ClassVar[str] = "moekit.jobs.place"
    needs_out: ClassVar[bool] = False
    command: ClassVar[CommandLine] = CommandLine(
        help="Decide which device holds which expert, by one of these solvers, and replay the trace to count the rows.",
        writes="folder of the placements and counts",
        arguments=("trace",),
        by_method="place",
        example=lambda record: f"moekit place {record.name} ./trace --devices 2,4,8 -o ./placement",
        # As people who think of ranks or of EPLB call them.
        aliases={"devices": "--ranks", "redundant": "--redundant-experts"},
    )

    trace: TraceRef = Field(description="trace that the placement is made for")
    method: str = Field(default="auto", description="solver; see moekit methods place; auto: exact where it can be")
    settings: dict[str, Any] = Field(default_factory=dict, description="the solver's own options")
    devices: tuple[int, ...] = Field(default=(2,), min_length=1, description="numbers of devices to place on")
    nodes: int = Field(default=1, ge=1, description="nodes that the devices stand in")
    replay: TraceRef | None = Field(
        default=None, description="trace to count rows on, of this model or of one tuned from it; the same by default"
    )
    other_weights: bool = Field(
        default=False, description="replay although the trace is of a model that is not known to be made from this one"
    )
    compare: tuple[str, ...] = Field(default=("contiguous", "random"), description="other solvers to count for, too")
    baseline: PlacementRef | None = Field(default=None, description="folder of another place step, of the free model")
    baseline_trace: TraceRef | None = Field(default=None, description="trace of the free model on the same documents")
    model: ModelRef | None = Field(default=None, description="write this model with its experts in device order")
    bandwidth: str | None = Field(
        default=None,
        description="of a link inside a node, then across nodes, such as 900GB/s,50GB/s: predict bytes and seconds",
    )
    latency: str | None = Field(
        default=None, description="before the first byte, inside a node, then across, such as 3us,10us"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="type of the hidden states that travel, for predicted bytes"
    )
    redundant: int = Field(default=0, ge=0, description="expert slots of each device for copies of hot experts")
    copies: Literal["added", "eplb"] = Field(
        default="added",
        description="added: keep the solver's owners; eplb: choose owners, too, by load alone. Both are counted, "
        "this one is written",
    )

    def wants_out(self) -> bool:
        """A model in device order is nothing that goes with the result."""
        return self.model is not None
