"""Expert parallelism side by side: bytes, exactness and time of every way to send tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from moekit.bench.dispatch.network import name_rate
from moekit.bench.dispatch.result import BenchResult, Bytes, EntryResult, Ratio
from moekit.report.data import BarsSection, Finding, KeyFigure, ReportData, TableSection, TextSection
from moekit.report.parts import Axis, BarGroup, BarSeries, Cell, Column, Interval, Reference, Table
from moekit.report.run_info import describe_run

KIB = 1024


def taking(result: BenchResult) -> list[EntryResult]:
    """Entries that took part."""
    return [entry for entry in result.entries if not entry.skipped]


def across(sent: Bytes | None) -> float | None:
    """Bytes that left all nodes in one step: by the devices where there were any, else as counted."""
    values = None if sent is None else sent.sent or sent.counted
    return None if values is None else float(sum(values))


def saved(entry: EntryResult, result: BenchResult) -> float | None:
    """Bytes of forward and backward relative to the baseline: -0.26 is 26 % fewer."""
    mine = across(entry.total)
    base = None if result.baseline is None else across(result.baseline.total)
    return None if mine is None or not base else mine / base - 1


def _name(entry: EntryResult) -> str:
    return f"{entry.name} (one batch)" if entry.shared_batch else entry.name


def bytes_section(result: BenchResult) -> TableSection:
    """What leaves the nodes, and whether the result is exact."""
    columns = (
        Column(name="way to send"),
        Column(name="forward", unit="B", note="bytes that leave all nodes in one step"),
        Column(name="forward and backward", unit="B"),
        Column(name="against all_to_all", unit="%", digits=1, signed=True),
        Column(name="collectives", digits=0),
        Column(name="tokens exact", unit="%", digits=1),
        Column(name="worst gradient", unit="%", digits=4, note="norm of the error over norm"),
        Column(name="rows out", digits=0),
        Column(name="replay says", digits=0),
        Column(name="busiest rank / mean", digits=2),
    )
    rows: list[tuple[Cell, ...]] = []
    for e in taking(result):
        exact = e.exactness
        rows.append(
            (
                _name(e),
                across(e.forward),
                across(e.total),
                saved(e, result),
                None if e.total is None else e.total.calls,
                None if exact is None else exact.share,
                None if exact is None else exact.worst_gradient,
                None if e.rows is None else e.rows.counted,
                None if e.rows is None else e.rows.replayed,
                e.load,
            )
        )
    how = "the network devices' own counters, headers included" if result.shaped else "the arguments of collectives"
    return TableSection(
        title="Bytes between nodes, and exactness",
        lead="Fewer bytes count only where every token is computed exactly.",
        note=f"Bytes are read from {how}. A token is exact if its output is within 1e-5 of that of one process in "
        "fp32. Rows of hierarchical are those across nodes. Ways marked (one batch) give every rank all tokens.",
        tables=(Table(columns=columns, rows=tuple(rows)),),
    )


def _interval(ratio: Ratio | None) -> Cell:
    if ratio is None:
        return None
    return Interval(mean=ratio.median - 1, low=ratio.low - 1, high=ratio.high - 1)


def time_section(result: BenchResult) -> TableSection:
    """Milliseconds at each rate, and paired ratios."""
    columns = (
        Column(name="way to send"),
        Column(name="forward", unit="ms", digits=1),
        Column(name="against all_to_all", unit="%", digits=1, signed=True, better="low"),
        Column(name="forward and backward", unit="ms", digits=1),
        Column(name="against all_to_all, both", unit="%", digits=1, signed=True, better="low"),
    )
    tables = []
    for rate in result.rates:
        rows: list[tuple[Cell, ...]] = []
        for e in taking(result):
            t = e.at(rate)
            if t is not None:
                ratios = _interval(t.forward_ratio), _interval(t.total_ratio)
                rows.append((_name(e), t.forward_ms, ratios[0], t.total_ms, ratios[1]))
        word = f"link between nodes: {name_rate(rate)}" + ("" if result.shaped or rate is None else ", modelled")
        tables.append(Table(columns=columns, rows=tuple(rows), caption=word))
    return TableSection(
        title="Time of a step",
        lead="Medians, and the paired difference to transformers' all_to_all with its 95 % interval.",
        note=f"{result.rounds} rounds at each rate; in every round all take their turn in the same processes, in an "
        "order drawn anew. A step lasts as long as its slowest rank.",
        tables=tuple(tables),
    )


def bars_section(result: BenchResult) -> BarsSection | None:
    """Bytes as bars; None where they are not known."""
    shown = [(e, across(e.forward), across(e.total)) for e in taking(result)]
    known = [(e, a, b) for e, a, b in shown if a is not None and b is not None]
    base = None if result.baseline is None else across(result.baseline.total)
    if not known:
        return None
    series = (
        BarSeries(name="forward", values=tuple(a / KIB for _, a, _ in known)),
        BarSeries(name="forward and backward", values=tuple(b / KIB for _, _, b in known)),
    )
    line = None if not base else Reference(axis="y", value=base / KIB, label="all_to_all, both")
    return BarsSection(
        title="Bytes between nodes, drawn",
        categories=tuple(_name(e) for e, _, _ in known),
        groups=(BarGroup(name="all", series=series),),
        x="way to send",
        y=Axis(label="KiB that leave all nodes in one step", zero=True),
        reference=line,
    )


def how_section(result: BenchResult) -> TextSection:
    """What was compared, for a reader who sees the page alone."""
    s = result.setting
    link = (
        "Each node is a network namespace; a virtual Ethernet device with a token bucket is the link between them."
        if result.shaped
        else "There is no shaped link."
    )
    paragraphs = [
        f"{s.ranks} ranks stand in {s.nodes} nodes and hold {s.tokens} tokens each: hidden size {s.hidden}, "
        f"{s.experts} experts of width {s.width}, {s.top_k} a token. {result.source[:1].upper()}{result.source[1:]}. "
        "Weights, tokens and choices are the same for all, in fp32, and gloo carries them.",
        link,
        "Once per expert a token travels as often as it chose experts; once per rank it travels once to each rank that "
        "holds any of them, and one partial sum comes back; hierarchical, once to each node, and is handed on inside. "
        "All-gather sends every token everywhere. A capacity (DeepSpeed, cf=1) drops what exceeds it: see the share of "
        "tokens computed exactly; without dropping it pads every expert to the largest count.",
        *result.notes,
        *(f"{e.name} took no part: {e.skipped}." for e in result.entries if e.skipped),
    ]
    return TextSection(title="How it was measured", paragraphs=tuple(paragraphs))


def headline(result: BenchResult) -> Finding:
    """The exact way of ours that sends fewest bytes for the same choices, against transformers' all-to-all."""
    wrong = [e.name for e in taking(result) if e.rows is not None and not e.rows.alike]
    if wrong:
        return Finding(text=f"Rows sent are not those that the replay counts: {', '.join(wrong)}.", status="failure")
    ours = [(saved(e, result), e) for e in taking(result) if e.entry.peer == "ours" and not e.shared_batch]
    # Another routing's choices are another model: exact for itself, but no saving for nothing.
    alike = [(share, e) for share, e in ours if not e.entry.routing]
    known = [(share, e) for share, e in alike if share is not None and e.exactness and e.exactness.share == 1]
    if not known:
        return Finding(text="There is no exact way of ours to hold against transformers' all_to_all.")
    share, best = min(known, key=lambda pair: pair[0])
    word = "fewer" if share < 0 else "more"
    text = f"{best.name} sends {abs(share):.1%} {word} bytes between nodes than transformers' all_to_all, exactly."
    return Finding(text=text, status="good" if share < 0 else "bad", detail="forward and backward, metadata included")


def findings(result: BenchResult) -> tuple[Finding, ...]:
    """Time of those that send fewer bytes, at each rate, and who is not exact."""
    found = []
    for e in taking(result):
        share = saved(e, result)
        if e.entry.peer == "ours" and not e.shared_batch and share is not None and share < 0:
            ratios = [(name_rate(t.rate), t.total_ratio) for t in e.timings if t.total_ratio is not None]
            found += [_time_finding(e.name, ratios, result.rounds)] if ratios else []
    for e in taking(result):
        if e.exactness is not None and e.exactness.share < 1:
            text = f"{e.name} computes {e.exactness.share:.1%} of the tokens exactly."
            found.append(Finding(text=text, status="bad"))
    return tuple(found)


def _time_finding(name: str, ratios: Sequence[tuple[str, Ratio]], rounds: int) -> Finding:
    spans = [f"{r.median:.3f} [{r.low:.3f}, {r.high:.3f}] at {rate}" for rate, r in ratios]
    slower = any(r.low > 1 for _, r in ratios)
    status: Literal["good", "neutral", "bad"] = "bad" if slower else "neutral"
    if all(r.high < 1 for _, r in ratios):
        status = "good"
    text = f"{name} takes this share of the time of transformers' all_to_all: {', '.join(spans)}."
    return Finding(text=text, status=status, detail=f"forward and backward, {rounds} paired rounds")


def _peers(result: BenchResult) -> dict[str, str]:
    return {name: result.machine[name] for name in ("deepspeed",) if name in result.machine}


def report(result: BenchResult, command: str = "") -> ReportData:
    """A page about a bench."""
    bars = bars_section(result)
    sections = [bytes_section(result), *([bars] if bars else []), time_section(result), how_section(result)]
    first = headline(result)
    base = None if result.baseline is None else across(result.baseline.total)
    figures = [KeyFigure(label="ways compared", value=str(len(taking(result))))]
    if base is not None:
        figures.append(KeyFigure(label="all_to_all", value=f"{base / KIB:.0f} KiB", note="between nodes, both passes"))
    return ReportData(
        title="Expert parallelism, side by side",
        subtitle=result.source,
        headline=first,
        findings=findings(result),
        figures=tuple(figures),
        sections=tuple(sections),
        run=describe_run(
            commands=(command,) if command else (),
            seed=result.setting.seed,
            more={"took": f"{result.seconds:.0f} s", "cores": result.machine.get("cores", "?"), **_peers(result)},
        ),
    )
