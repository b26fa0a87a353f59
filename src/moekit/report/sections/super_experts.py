"""The experts that make massive activations: where, which, and whether the model breaks without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moekit.diagnose.super_experts.massive_activations import LayerStream
from moekit.diagnose.super_experts.report import SHARED, Candidate, SuperExpertReport
from moekit.evaluation.comparison import Comparison
from moekit.evaluation.skipping import UNCHANGED
from moekit.evaluation.super_expert_study import SuperExpertStudy
from moekit.evaluation.super_experts import BREAKS, RANDOM, WITHOUT, SuperExpertCheck
from moekit.report.data import Finding, LinesSection, Section, TableSection
from moekit.report.markup import number
from moekit.report.parts import Axis, Cell, Column, LineChart, Point, Series, Table
from moekit.report.sections.evaluations import relative

_STATUS = {"breaks": "bad", "suffers": "bad"}
_MADE_BY = {"experts": "several experts", "dense": "dense network", "layer": "dense layer", "shared": "shared expert"}


def super_expert_sections(study: SuperExpertStudy, name: str = "") -> list[Section]:
    """A chart of the largest activations, tables of layers and experts, and the check where there is one.

    Args:
        study: what was found.
        name: which model, where a page holds several.
    """
    suffix = f": {name}" if name else ""
    sections: list[Section] = [_chart(study, suffix), _experts(study, suffix)]
    if study.check is not None:
        sections.append(_checked(study.check, suffix))
    return sections


def super_expert_finding(study: SuperExpertStudy) -> Finding:
    """What was found and whether the model breaks, for the head of the page."""
    check = study.check
    text = study.report.verdict if check is None else f"{study.report.verdict}; {check.verdict}"
    return Finding(
        text=f"{text[0].upper()}{text[1:]}.",
        status="bad" if check is not None and check.outcome in _STATUS else "neutral",
        detail=f"Found on {study.report.tokens:,} tokens of {study.source or 'a text'}."
        + ("" if check is None else f" Checked on {check.tokens:,} tokens of {check.source}."),
    )


def _chart(study: SuperExpertStudy, suffix: str) -> LinesSection:
    series = [Series(name="on the text they were found on", points=_line({s.layer: s.value for s in study.streams}))]
    if study.check is not None:
        names = {UNCHANGED: "unchanged, held-out text", WITHOUT: WITHOUT, RANDOM: "without as many others"}
        series += [Series(name=names[key], points=_line(study.check.largest[key])) for key in names]
    chart = LineChart(
        title="largest |activation| after each layer",
        x=Axis(label="decoder layer"),
        y=Axis(label="largest |value| of the residual stream", zero=True),
        series=tuple(series),
    )
    massive = [s for s in study.streams if s.massive]
    made = [s for s in massive if s.origin != "passed on"]
    lead = (
        f"In {len(massive)} of {len(study.streams)} layers some value is massive: above 100 and above 1,000 medians. "
        f"{_made(made)}"
        if massive
        else "No layer holds a massive activation: no value is above 100 and above 1,000 medians."
    )
    return LinesSection(
        title=f"Massive activations{suffix}",
        lead=lead,
        note="A massive activation is made in one layer and handed on by the residual stream. Where the line without "
        "super experts stays low, they make it. Of others at random the median of the draws is shown.",
        charts=(chart,),
    )


def _line(values: Mapping[int, float]) -> tuple[Point, ...]:
    return tuple(Point(x=layer, y=value) for layer, value in sorted(values.items()))


def _made(streams: Sequence[LayerStream]) -> str:
    told = [f"layer {s.layer} ({made_by(s)}, channel {s.gain_channel}: {number(s.gain, 1)})" for s in streams]
    return f"Made in {', '.join(told)}." if told else ""


def made_by(stream: LayerStream) -> str:
    """What makes a layer's massive activation, in words; "" where nothing is massive."""
    return f"expert {stream.expert}" if stream.origin == "routed" else _MADE_BY.get(stream.origin, stream.origin)


def _experts(study: SuperExpertStudy, suffix: str) -> TableSection:
    report = study.report
    streams = (
        Column(name="layer"),
        Column(name="block"),
        Column(name="largest |activation|", digits=2),
        Column(name="channel"),
        Column(name="position", note="of the token in its sequence"),
        Column(name="median", digits=4, note="of all |activations| after the layer"),
        Column(name="block adds", digits=2, note="most to the magnitude of one activation"),
        Column(name="massive, made by", note="the expert whose largest output lies at the channel that grows most"),
    )
    experts = (
        Column(name="expert"),
        Column(name="layer"),
        Column(name="super expert"),
        Column(name="largest |output|", digits=2, note="before it is weighted by the router"),
        Column(name="channel"),
        Column(name="position"),
        Column(name="× percentile", digits=2),
        Column(name="× share", digits=2),
        Column(name="layer forms", note="a massive activation"),
    )
    rows = [_expert_row(c, "yes") for c in report.found] + [_expert_row(c, "") for c in report.others]
    return TableSection(
        title=f"Which block makes them{suffix}",
        lead=f"{report.verdict[0].upper()}{report.verdict[1:]}.",
        note=_rule(report),
        tables=(
            Table(columns=experts, rows=tuple(rows), caption="Experts of the largest outputs"),
            Table(columns=streams, rows=tuple(map(_stream_row, study.streams)), caption="Layer by layer"),
        ),
    )


def _rule(report: SuperExpertReport) -> str:
    rule = report.rule
    gain = "whose block adds more than 100 and more than 1,000 medians to one activation"
    where = gain if rule.forming == "gain" else "of the first 75 %"
    return (
        f"A super expert's largest output exceeds percentile {rule.percentile:g} ({number(report.percentile, 2)}) and "
        f"{rule.ratio:g} of the largest ({number(report.largest, 2)}) of all that are compared, in a layer {where}. "
        f"At most {report.room} experts can exceed the percentile of so many."
    )


def _stream_row(s: LayerStream) -> tuple[Cell, ...]:
    return (s.layer, s.kind, s.value, s.channel, s.position, s.median, s.gain, made_by(s) or None)


def _expert_row(c: Candidate, mark: str) -> tuple[Cell, ...]:
    told = "yes" if c.forms else "no"
    return (_name(c.expert), c.layer, mark, c.value, c.channel, c.position, c.over_percentile, c.over_ratio, told)


def _name(expert: int) -> str:
    return "shared" if expert == SHARED else str(expert)


def _checked(check: SuperExpertCheck, suffix: str) -> TableSection:
    columns = (
        Column(name="model"),
        Column(name="skipped", note="layer:expert"),
        Column(name="perplexity", digits=2),
        Column(name="difference, paired", unit="%", digits=2, signed=True, better="low"),
    )
    assert check.without.overall is not None
    rows: list[tuple[Cell, ...]] = [(UNCHANGED, "", check.without.overall.a.perplexity, None)]
    rows.append(_check_row(WITHOUT, check.pairs, check.without))
    rows += [_check_row(f"{RANDOM}, draw {c.seed}", c.pairs, c.text) for c in check.controls]
    assert check.against.overall is not None
    against = relative(check.against.overall.difference)
    rows.append((f"{WITHOUT}, against the mean of others", "", check.without.overall.b.perplexity, against))
    verdict = check.verdict
    return TableSection(
        title=f"Does the model break without them?{suffix}",
        lead=f"{verdict[0].upper()}{verdict[1:]}.",
        note=f"{check.without.overall.a.documents} held-out documents, {check.tokens:,} tokens, in windows of "
        f"{check.window}. A token that chooses a skipped expert gets nothing from it; routers choose as before. Others "
        "are drawn in the same layers where there are so many. A model breaks where the intervals lie above "
        f"× {BREAKS:g}, and against others above × 1: 95 % bootstrap intervals over documents, paired; of "
        "fewer than 20 no narrower than Student's.",
        tables=(Table(columns=columns, rows=tuple(rows)),),
    )


def _check_row(name: str, pairs: Sequence[tuple[int, int]], text: Comparison) -> tuple[Cell, ...]:
    assert text.overall is not None
    listed = " ".join(f"{layer}:{_name(expert)}" for layer, expert in pairs)
    return (name, listed, text.overall.b.perplexity, relative(text.overall.difference))
