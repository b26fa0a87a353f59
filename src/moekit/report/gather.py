"""From the artefacts of a run to the numbers of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.errors import BadConfig, BadData
from moekit.placement import Placement
from moekit.report.data import Finding, KeyFigure, LinesSection, ReportData, Section, TableSection
from moekit.report.inputs import ReportInputs
from moekit.report.parts import Column, Interval, Table
from moekit.report.results import StepResult, load_comparison, load_replay, load_studies, placement_file
from moekit.report.run_info import describe_run
from moekit.report.sections.c2r import Curve, CurvePoint, curve_findings, curve_section, headline, key_figures
from moekit.report.sections.evaluations import comparison_section, relative
from moekit.report.sections.fitted import fitted_finding, fitted_section
from moekit.report.sections.placements import PlacementRow, placement_section
from moekit.report.sections.pruned import pruned_section
from moekit.report.sections.super_experts import super_expert_finding, super_expert_sections
from moekit.report.sections.traces import Coactivations, by_layer_section, coactivation_section, load_section
from moekit.trace import Trace, summarise

if TYPE_CHECKING:
    from moekit.evaluation import Comparison
    from moekit.trace import TraceSummary


def report_data(inputs: ReportInputs) -> ReportData:
    """Everything that a report is made from, as one page's numbers.

    Args:
        inputs: artefacts of the run.

    Raises:
        BadConfig: `costs` and `constrained` do not go together.
        BadData: an artefact is missing or damaged.
    """
    curves = _curves(inputs)
    comparisons = [load_comparison(folder) for folder in inputs.evaluations]
    sections: list[Section] = []
    if curves:
        lead = "Each point is one routing, placed as well as it can be; every token is sent once per device."
        sections.append(curve_section(curves, lead=lead))
    if comparisons:
        sections.append(comparison_section(comparisons))
    if inputs.free is not None:
        sections.append(placement_section(_placement_rows(inputs), note=_REPLAY_NOTE))
    if inputs.traces:
        sections += _trace_sections(inputs)
    studies = load_studies(inputs.super_experts, inputs.finished)
    for name, study in studies.items():
        sections += super_expert_sections(study, name if len(studies) > 1 else "")
    sections += filter(None, (fitted_section(inputs.finished), pruned_section(inputs.finished)))
    if inputs.finished:
        sections.append(_steps_section(inputs.finished))
    found = [*fitted_finding(inputs.finished), *(super_expert_finding(study) for study in studies.values())]
    if not curves and not comparisons and not inputs.traces and found:
        first, *found = found
    else:
        first = headline(curves) if curves else _plain_headline(comparisons, inputs)
    return ReportData(
        title=inputs.title,
        subtitle=inputs.subtitle,
        headline=first,
        findings=(*(curve_findings(curves) if curves else ()), *found),
        figures=key_figures(curves) if curves else _figures(comparisons),
        sections=tuple(sections),
        run=describe_run(commands=[inputs.command], seed=inputs.seed, hashes=_hashes(inputs)),
    )


_REPLAY_NOTE = (
    "Rows are counted by replaying the trace token by token: rows sent per token and layer, the token's own device "
    "included. Random placements are averaged over seeds."
)


def _curves(inputs: ReportInputs) -> list[Curve]:
    if inputs.free is None or not inputs.constrained:
        return []
    if len(inputs.costs) != len(inputs.constrained):
        raise BadConfig(
            f"{len(inputs.constrained)} placements of constrained models, but {len(inputs.costs)} evaluations of them",
            hint="`costs` needs one evaluate step, with a baseline, for each entry of `constrained`, in the same order",
        )
    costs = [load_comparison(folder) for folder in inputs.costs]
    free = {part["devices"]: part for part in load_replay(inputs.free)["devices"]}
    points: dict[int, list[CurvePoint]] = {}
    for folder, comparison in zip(inputs.constrained, costs, strict=True):
        results = load_replay(folder)
        for part in results["devices"]:
            if part["devices"] in free:
                point = _point(folder, results["routing"], part, comparison)
                points.setdefault(part["devices"], []).append(point)
    curves = []
    for devices, found in points.items():
        rows = {row["name"]: row for row in free[devices]["rows"]}
        contiguous = rows.get("contiguous")
        best = free[devices]["rows"][-1]
        curves.append(
            Curve(
                devices=devices,
                top_k=round(best["once_per_expert"]),
                placed=best["rows_per_token"],
                contiguous=None if contiguous is None else contiguous["rows_per_token"],
                points=tuple(found),
            )
        )
    return curves


def _point(folder: str, routing: str, part: dict[str, Any], comparison: Comparison) -> CurvePoint:
    gain = part["gain"]
    if gain is None:
        hint = "give the place step `baseline` and `baseline_trace`"
        raise BadData("it was not compared with the unconstrained model", file=folder, hint=hint)
    cost = relative(comparison.overall.difference if comparison.overall is not None else None)
    if cost is None:
        raise BadData(f"{comparison.b} was not compared on at least two documents", file=folder)
    saving = Interval(mean=gain["change"], low=gain["change_low"], high=gain["change_high"])
    best = part["rows"][-1]
    return CurvePoint(
        name=comparison.b,
        kind="device" if "mode='device'" in routing else "list",
        rows=best["rows_per_token"],
        saving=saving,
        cost=cost,
        load=best["imbalance"],
        trained_alike=gain["trained_alike"],
    )


def _placement_rows(inputs: ReportInputs) -> list[PlacementRow]:
    assert inputs.free is not None
    rows: list[PlacementRow] = []
    parts = {part["devices"]: part for part in load_replay(inputs.free)["devices"]}
    for devices, part in parts.items():
        per_expert = part["rows"][0]["once_per_expert"]
        common = {"devices": devices, "routing": "plain", "per_expert": per_expert}
        rows.append(PlacementRow(**common, placement="any", sending="once per expert", rows=per_expert))
        for row in part["rows"]:
            is_own = row is part["rows"][-1]
            rows.append(
                PlacementRow(
                    **common,
                    placement="best" if is_own else row["name"],
                    sending="once per device",
                    rows=row["rows_per_token"],
                    load=row["imbalance"],
                    solver=part["solver"] if is_own else "",
                    gap=row["gap"] if is_own else None,
                )
            )
    for folder, cost in zip(inputs.constrained, inputs.costs, strict=True):
        for part in load_replay(folder)["devices"]:
            if part["devices"] in parts:
                rows.append(_constrained_row(part, parts[part["devices"]], load_comparison(cost).b))
    return rows


def _constrained_row(part: dict[str, Any], free: dict[str, Any], name: str) -> PlacementRow:
    best = part["rows"][-1]
    return PlacementRow(
        devices=part["devices"],
        routing=name,
        placement="best",
        sending="once per device",
        rows=best["rows_per_token"],
        per_expert=free["rows"][0]["once_per_expert"],
        load=best["imbalance"],
        solver=part["solver"],
        gap=best["gap"],
    )


def _trace_sections(inputs: ReportInputs) -> list[Section]:
    places = _places(inputs)
    traces = {
        name: Trace.load(folder) for name, folder in zip(_trace_names(inputs, places), inputs.traces, strict=True)
    }
    panels: list[Coactivations] = []
    loads: dict[str, dict[int, Any]] = {}
    for name, trace in traces.items():
        found = trace.require(["coactivation", "load"])
        counts = {layer: found[layer]["coactivation"].numpy() for layer in trace.meta.layers}
        loads[name] = {layer: found[layer]["load"].numpy() for layer in trace.meta.layers}
        placement = places[trace.digest].placement if trace.digest in places else None
        if placement is None or not panels:
            panels.append(Coactivations(name=f"{name}, experts as they stand", counts=counts))
        if placement is not None:
            orders, blocks = placement.orders(), {layer: placement.sizes(layer) for layer in placement.layers}
            title = f"{name}, placed on {placement.devices} devices"
            panels.append(Coactivations(name=title, counts=counts, orders=orders, blocks=blocks))
    note = "Outlines are devices; each routing has its own placement, planned on other text." if places else ""
    summaries = {name: summarise(trace) for name, trace in traces.items()}
    return [coactivation_section(panels, note=note), load_section(loads), _by_layer(summaries)]


@dataclass(frozen=True)
class _Place:
    """What became of a trace: how its model is called, and its placement on the most devices."""

    name: str
    placement: Placement


def _places(inputs: ReportInputs) -> dict[str, _Place]:
    """Digest of a replayed trace -> its placement."""
    if inputs.free is None:
        return {}
    names = [load_comparison(folder).b for folder in inputs.costs] or [
        Path(folder).name for folder in inputs.constrained
    ]
    found = {}
    for folder, name in zip((inputs.free, *inputs.constrained), (_PLAIN, *names), strict=True):
        results = load_replay(folder)
        devices = max(part["devices"] for part in results["devices"])
        placement = Placement.load(Path(folder) / placement_file(devices))
        found[str(results["trace"])] = _Place(name, placement)
    return found


_PLAIN = "plain top-k"


def _trace_names(inputs: ReportInputs, places: Mapping[str, _Place]) -> list[str]:
    """As given; else as the replay or evaluation of the same trace calls it; else the folder's name."""
    given, folders = inputs.trace_names, inputs.traces
    if given and len(given) != len(folders):
        raise BadConfig(f"{len(folders)} traces, but {len(given)} names", hint="name each trace, or none")
    if given:
        return list(given)
    digests = [Trace.load(folder).digest for folder in folders]
    return [
        places[digest].name if digest in places else Path(folder).name
        for digest, folder in zip(digests, folders, strict=True)
    ]


def _by_layer(summaries: Mapping[str, TraceSummary]) -> LinesSection:
    """How even, how companionable and how domain-aware each layer is."""
    charts: dict[str, dict[str, dict[int, float]]] = {}
    for name, summary in summaries.items():
        for layer in summary.layers:
            figures = {"load: standard deviation / mean": layer.load.cv}
            if layer.collaboration is not None:
                figures["effective partners, exp(H)"] = layer.collaboration.effective_partners
            if layer.domains is not None:
                figures["domain information, NMI above chance"] = layer.domains.excess
            for quantity, value in figures.items():
                charts.setdefault(quantity, {}).setdefault(name, {})[layer.layer] = value
    note = "NMI: normalised mutual information of domain and chosen expert, less what shuffled documents give."
    return by_layer_section(charts, title="Figures by layer", zero=True, note=note)


def _steps_section(finished: Sequence[StepResult]) -> TableSection:
    columns = (Column(name="step"), Column(name="does"), Column(name="with"))
    rows = []
    for done in finished:
        skipped = ("id", "use", "seed")
        told = [
            f"{key}={value}" for key, value in done.config.items() if key not in skipped and value not in (None, "")
        ]
        text = ", ".join(told)
        rows.append((done.id, done.use, text if len(text) <= 160 else text[:159] + "…"))
    return TableSection(title="What was done", tables=(Table(columns=columns, rows=tuple(rows)),))


def _plain_headline(comparisons: Sequence[Comparison], inputs: ReportInputs) -> Finding:
    """Without a constraint to judge, the first line is the first comparison."""
    for comparison in comparisons:
        change = relative(comparison.overall.difference if comparison.overall is not None else None)
        if change is not None:
            text = f"Against {comparison.a}, the perplexity of {comparison.b} changes by {change.mean:+.1%} "
            return Finding(text=f"{text}({change.low:+.1%} to {change.high:+.1%}, 95 %, paired over documents).")
    for comparison in comparisons:
        if comparison.overall is not None:
            a, b = (part.perplexity for part in (comparison.overall.a, comparison.overall.b))
            text = f"From {comparison.a} to {comparison.b} perplexity {a:.2f} becomes {b:.2f}"
            return Finding(text=f"{text}; one document gives no interval.")
    if inputs.traces:
        return _routing_finding(Trace.load(inputs.traces[0]))
    return Finding(text=f"{inputs.title}: nothing was compared.")


def _routing_finding(trace: Trace) -> Finding:
    """How balanced a routing is and how well it tells domains apart, in one sentence."""
    summary = summarise(trace)
    balance = [layer.load for layer in summary.layers]
    busiest = sum(load.max_over_mean for load in balance) / len(balance)
    text = f"The busiest expert of a layer does {busiest:.2f} times the mean"
    idle = sum(load.never_routed for load in balance)
    text += f", and {idle} experts do nothing" if idle else ", and no expert is idle"
    if summary.mean_domains is not None:
        found, chance = summary.mean_domains["normalised"], summary.mean_domains["shuffled"]
        text += f"; routing tells {len(summary.domains)} domains apart with an NMI of {found:.3f} (chance {chance:.3f})"
    return Finding(text=f"{text}.", detail=f"Means over {len(balance)} layers and {summary.tokens:,} tokens.")


def _figures(comparisons: Sequence[Comparison]) -> tuple[KeyFigure, ...]:
    return tuple(
        KeyFigure(
            label=f"Perplexity of {c.b}", value=f"{c.overall.b.perplexity:.2f}", note=f"{c.overall.a.perplexity:.2f}"
        )
        for c in comparisons
        if c.overall is not None
    )


def _hashes(inputs: ReportInputs) -> dict[str, str]:
    return {
        f"trace {name}": Trace.load(folder).digest
        for name, folder in zip(_trace_names(inputs, _places(inputs)), inputs.traces, strict=True)
    }
