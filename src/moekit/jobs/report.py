"""`use: report`: one self-contained page about the steps of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekit.checkpoint import atomic_write
from moekit.jobs.context import JobContext
from moekit.jobs.options.report import ReportOptions
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.report import build
from moekit.report.gather import report_data
from moekit.report.inputs import ReportInputs

PAGE = "report.html"


def estimate(options: ReportOptions, out: Path, sizes: Sizes) -> Forecast:
    """A page is a few MiB at most."""
    names = (
        *options.traces,
        *((options.free,) if options.free else ()),
        *options.constrained,
        *options.costs,
        *options.evaluations,
    )
    names += options.super_experts
    reads = tuple(sizes.item(name) for name in dict.fromkeys(names))
    return Forecast(reads, (Item(str(out), 4 << 20),), disk=4 << 20, memory=256 << 20)


def run(options: ReportOptions, context: JobContext) -> dict[str, Any]:
    """Gather, draw, write."""
    data = report_data(
        ReportInputs(
            title=options.title,
            subtitle=options.subtitle,
            traces=options.traces,
            trace_names=options.trace_names,
            free=options.free,
            constrained=options.constrained,
            costs=options.costs,
            evaluations=options.evaluations,
            super_experts=options.super_experts,
            finished=tuple(context.finished.values()),
            command=context.command,
            seed=context.seed,
        )
    )
    page = build(data, context.out / PAGE, strict=options.strict)
    if options.publish:
        for file in (page, page.with_suffix(".json")):
            atomic_write(context.out.parent / file.name, file.read_bytes())
    findings = [finding.text for finding in (data.headline, *data.findings)]
    return {"page": str(page), "findings": findings, "failures": list(data.failures)}
