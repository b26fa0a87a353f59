"""What a report about a run is made from."""

from __future__ import annotations

from dataclasses import dataclass

from moekit.report.results import StepResult


@dataclass(frozen=True)
class ReportInputs:
    """Artefacts of a run and what to call them.

    Attributes:
        title: heading of the page.
        subtitle: line under it, such as the model and the text.
        traces: folders of traces for heat maps and load bars, before and after.
        trace_names: what to call them; empty for their folders' names.
        free: folder of the placements of the unconstrained model.
        constrained: folders of the placements of constrained models.
        costs: folders of evaluations, one for each of `constrained`.
        evaluations: folders of evaluations with a baseline.
        super_experts: folders of studies of super experts.
        finished: steps of the run that are done.
        command: what made the page.
        seed: of the run.
    """

    title: str = "moekit report"
    subtitle: str = ""
    traces: tuple[str, ...] = ()
    trace_names: tuple[str, ...] = ()
    free: str | None = None
    constrained: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()
    evaluations: tuple[str, ...] = ()
    super_experts: tuple[str, ...] = ()
    finished: tuple[StepResult, ...] = ()
    command: str = ""
    seed: int = 0
