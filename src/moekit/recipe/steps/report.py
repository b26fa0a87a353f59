"""`use: report`: one self-contained page about the steps of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moekit._files import read_bytes
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import PlacementRef, ResultsRef, TraceRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.recipe.steps.base import Step

PAGE = "report.html"


class ReportStep(Step):
    """Put traces, placements and evaluations of a run on one page, and the same numbers into a JSON file.

    The page says first what a routing constraint adds beyond placement alone, with a paired interval.
    """

    use: Literal["report"] = "report"
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

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """A page is a few MiB at most."""
        names = (*self.traces, *((self.free,) if self.free else ()), *self.constrained, *self.costs, *self.evaluations)
        names += self.super_experts
        reads = tuple(sizes.item(name) for name in dict.fromkeys(names))
        return Forecast(reads, (Item(str(out), 4 << 20),), disk=4 << 20, memory=256 << 20)

    def run(self, work: JobContext) -> dict[str, Any]:
        """Gather, draw, write."""
        from moekit.checkpoint import atomic_write
        from moekit.report import build
        from moekit.report.gather import report_data
        from moekit.report.inputs import ReportInputs

        data = report_data(
            ReportInputs(
                title=self.title,
                subtitle=self.subtitle,
                traces=self.traces,
                trace_names=self.trace_names,
                free=self.free,
                constrained=self.constrained,
                costs=self.costs,
                evaluations=self.evaluations,
                super_experts=self.super_experts,
                finished=tuple(work.finished.values()),
                command=work.command,
                seed=work.seed,
            )
        )
        page = build(data, work.out / PAGE, strict=self.strict)
        if self.publish:
            for file in (page, page.with_suffix(".json")):
                atomic_write(work.out.parent / file.name, read_bytes(file))
        findings = [finding.text for finding in (data.headline, *data.findings)]
        return {"page": str(page), "findings": findings, "failures": list(data.failures)}
