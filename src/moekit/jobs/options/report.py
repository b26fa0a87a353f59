"""Options of `moekit.jobs.report`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from moekit.jobs.options.base import CommandLine, JobOptions, PlacementRef, ResultsRef, TraceRef

PAGE, NUMBERS = "report.html", "report.json"


class ReportOptions(JobOptions):
    """Put traces, placements and evaluations of a run on one page, and the same numbers into a JSON file.

    The page says first what a routing constraint adds beyond placement alone, with a paired interval.
    """

    job: ClassVar[str] = "moekit.jobs.report"
    command: ClassVar[CommandLine] = CommandLine(
        help="Write one self-contained page, and the same numbers as JSON, about traces, placements and evaluations.",
        writes="folder of the page",
        examples=(
            "moekit report --traces ./before/trace,./after/trace --evaluations ./after -o ./report",
            "moekit report --free ./placed --constrained ./placed-t8 --costs ./evaluated-t8 -o ./report",
        ),
    )

    title: str = Field(default="moekit report", description="heading of the page")
    subtitle: str = Field(default="", description="line under it, such as the model and the text")
    traces: tuple[TraceRef, ...] = Field(default=(), description="traces for heat maps and load bars, before and after")
    trace_names: tuple[str, ...] = Field(default=(), description="what to call them; their folders' names by default")
    free: PlacementRef | None = Field(default=None, description="place step of the unconstrained model")
    constrained: tuple[PlacementRef, ...] = Field(default=(), description="place steps of constrained models")
    costs: tuple[ResultsRef, ...] = Field(default=(), description="evaluate steps, one for each of `constrained`")
    evaluations: tuple[ResultsRef, ...] = Field(default=(), description="evaluate steps with a baseline, for tables")
    super_experts: tuple[ResultsRef, ...] = Field(
        default=(),
        description="super-experts steps, for a chart and tables; others of the run are shown, too, but only those "
        "named here make the page anew when they change",
    )
    publish: bool = Field(default=False, description="put the page and its numbers beside the step folders, too")
    strict: bool = Field(default=True, description="fail if the page finds that a measurement shows nothing")

    def further_outputs(self, out: Path) -> tuple[Path, ...]:
        """The page and its numbers beside the folder, where they are wanted there, too."""
        return tuple(out.parent / name for name in (PAGE, NUMBERS)) if self.publish else ()
