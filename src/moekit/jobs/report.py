"""`use: report`: one self-contained page about the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekit._files import read_bytes
from moekit.checkpoint import atomic_write
from moekit.jobs.call import JobResult, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.report import NUMBERS, PAGE, ReportOptions
from moekit.progress import ProgressLike
from moekit.report import build
from moekit.report.gather import report_data
from moekit.report.inputs import ReportInputs


class ReportResult(JobResult):
    """The page, and what it says first.

    Attributes:
        page: the file.
        findings: sentences.
        failures: measurements that show nothing.
    """

    page: str
    findings: list[str]
    failures: list[str]


def write_report(
    *,
    title: str = "moekit report",
    subtitle: str = "",
    traces: Sequence[str | Path] = (),
    trace_names: Sequence[str] = (),
    free: str | Path | None = None,
    constrained: Sequence[str | Path] = (),
    costs: Sequence[str | Path] = (),
    evaluations: Sequence[str | Path] = (),
    super_experts: Sequence[str | Path] = (),
    publish: bool = False,
    strict: bool = True,
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> ReportResult:
    """Put traces, placements and evaluations of a run on one page, and the same numbers into a JSON file.

    Args:
        title: heading of the page.
        subtitle: line under it, such as the model and the text.
        traces: traces for heat maps and load bars, before and after.
        trace_names: what to call them; their folders' names by default.
        free: place step of the unconstrained model.
        constrained: place steps of constrained models.
        costs: evaluate steps, one for each of `constrained`.
        evaluations: evaluate steps with a baseline, for tables.
        super_experts: super-experts steps, for a chart and tables; others of the run are shown, too, but only those
            named here make the page anew when they change.
        publish: put the page and its numbers beside the step folders, too.
        strict: fail if the page finds that a measurement shows nothing.
        out: folder of the page.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit report` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(ReportOptions, ReportResult, dict(locals()))


def estimate(options: ReportOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
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
    return JobEstimate(reads, (Item(str(out), 4 << 20),), disk=4 << 20, memory=256 << 20)


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
        for name in (PAGE, NUMBERS):
            atomic_write(context.out.parent / name, read_bytes(context.out / name))
    findings = [finding.text for finding in (data.headline, *data.findings)]
    return {"page": str(page), "findings": findings, "failures": list(data.failures)}
