"""All pruning methods side by side: what each costs at each size, ranked, and where it shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from moekit.bench.pruning.ranking import NOT, mean_nll, part
from moekit.bench.pruning.result import ALL, CalibrationDraw, PruneBenchResult, PruneRun, RankRow, Share
from moekit.bench.pruning.setting import FREQUENCY, RANDOM
from moekit.report.data import LinesSection, ReportData, Section, TableSection, TextSection
from moekit.report.markup import number
from moekit.report.parts import Axis, Cell, Column, Interval, LineChart, Point, Series, Table
from moekit.report.run_info import describe_run
from moekit.report.sections.evaluations import interval
from moekit.report.sections.pruning_findings import findings, headline, keep_name, key_figures, whole

# A chart tells so many lines apart, random's among them.
LINES = 6
LOSS = "loss, nats a token"


def report(result: PruneBenchResult, command: str = "") -> ReportData:
    """A page about a bench."""
    sections: list[Section] = [*pareto_sections(result), ranking_section(result)]
    if result.setting.domains:
        sections.append(tasks_section(result))
    layers = layers_section(result)
    sections += [inside_section(result), *([layers] if layers is not None else []), how_section(result)]
    return ReportData(
        title="Pruning methods, side by side",
        subtitle=f"{max(result.experts.values())} experts in {len(result.experts)} layers, {result.top_k} a token",
        headline=headline(result),
        findings=findings(result),
        figures=key_figures(result),
        sections=tuple(sections),
        run=describe_run(
            commands=(command,) if command else (),
            seed=result.setting.seed,
            hashes={"model": result.fingerprint},
            more={"took": f"{result.seconds:.0f} s", "the one pass": f"{result.calibration_seconds:.0f} s"},
        ),
    )


def _order(result: PruneBenchResult) -> list[str]:
    """Methods, the best at the smallest size first, then those that were run at other sizes alone."""
    return list(dict.fromkeys(row.name for ranking in whole(result) for row in ranking.rows))


def _random(result: PruneBenchResult) -> list[str]:
    return [entry.name for entry in result.setting.entries if entry.method == RANDOM][:1]


def _groups(result: PruneBenchResult) -> list[list[str]]:
    """Methods as they share a chart: random, and the next best."""
    control = _random(result)
    others = [name for name in _order(result) if name not in control]
    size = LINES - len(control)
    return [control + others[i : i + size] for i in range(0, len(others), size)] or [control]


def pareto_sections(result: PruneBenchResult) -> list[LinesSection]:
    """Loss against the share of experts kept: a line for each method, random with a band."""
    groups = _groups(result)
    total = sum(result.experts.values())
    found = []
    for place, names in enumerate(groups):
        series = [
            Series(name=name, points=points, band=name in _random(result))
            for name in names
            if (points := _line(result, name, total))
        ]
        title = "What it costs to drop experts" + ("" if len(groups) == 1 else f", {place + 1} of {len(groups)}")
        lead = (
            "Lower is better, and the line that stays low to the left is the method to choose: it loses least as "
            "experts go. The right end is the unchanged model. The band spans all seeds of random pruning, the line in "
            "it is their mean; a method inside the band has learnt nothing."
        )
        more = "The same for the next methods in the ranking, with random pruning again."
        if series:
            chart = LineChart(
                title=title, x=Axis(label="experts kept", unit="%"), y=Axis(label=LOSS), series=tuple(series)
            )
            found.append(LinesSection(title=title, lead=more if place else lead, charts=(chart,)))
    return found


def _line(result: PruneBenchResult, name: str, total: int) -> tuple[Point, ...]:
    points = [Point(x=1.0, y=result.unchanged.overall.nll, label="unchanged")]
    for keep in result.setting.keep:
        runs = result.select(name, keep)
        if not runs:
            continue
        each = [run.perplexity.overall.nll for run in runs]
        several = len(each) > 1
        points.append(
            Point(
                x=sum(runs[0].experts.values()) / total,
                y=statistics.fmean(each),
                y_low=min(each) if several else None,
                y_high=max(each) if several else None,
            )
        )
    return tuple(sorted(points, key=lambda p: p.x)) if len(points) > 1 else ()


def ranking_section(result: PruneBenchResult) -> TableSection:
    """All methods at each size, best first."""
    columns = (
        Column(name="method"),
        Column(name=LOSS, digits=3),
        Column(name="perplexity", digits=2),
        Column(name="rise", digits=3, signed=True, better="low", note="over the unchanged model, nats a token, paired"),
        Column(
            name="avoided",
            unit="%",
            digits=0,
            note="share of random's rise, where that shows; beyond 100 % is better than unchanged",
        ),
        Column(name="against frequency", digits=3, signed=True, better="low", note="nats a token, paired"),
    )
    return TableSection(
        title="All methods, ranked",
        lead="Best first. What counts is the rise over the unchanged model, document by document, and how much of the "
        "rise of random pruning a method avoids: 100 % would be for free, 0 % is no better than chance.",
        note="Intervals are 95 % over documents: they say what other text would give, not what another model would. "
        "Rows are not corrected for their number. Methods that keep the same experts have equal rows.",
        tables=_tables(result, columns, _ranked_row),
    )


def inside_section(result: PruneBenchResult) -> TableSection:
    """What changes inside, how far seeds differ, and what methods take."""
    columns = (
        Column(name="method"),
        Column(name="output changed", unit="%", digits=0, note="||Z' - Z|| / ||Z|| of a layer's output, mean"),
        Column(name="tokens that lost an expert", unit="%", digits=0, note="which they had chosen; mean over layers"),
        Column(name="seeds", note="more than one where a method draws numbers"),
        Column(name="spread over seeds", digits=3, note="standard deviation of the loss"),
        Column(name="seconds", digits=1, note="to decide and to make new weights; the one pass for all not counted"),
    )
    return TableSection(
        title="What changes inside",
        lead="Most methods work by keeping tokens' experts, or a layer's output, as they were. Where one ranks better "
        "than these figures say, later layers made up for it.",
        tables=_tables(result, columns, _inside_row),
    )


def _tables(
    result: PruneBenchResult, columns: tuple[Column, ...], row: Callable[[RankRow], tuple[Cell, ...]]
) -> tuple[Table, ...]:
    found = []
    for ranking in reversed(whole(result)):
        size = ranking.rows[0].bytes / result.bytes
        words = f"{keep_name(ranking.keep)}: {number(size, 0, '%')} of the bytes; unchanged {ranking.unchanged:.3f}"
        found.append(Table(columns=columns, rows=tuple(map(row, ranking.rows)), caption=words))
        # What columns mean is said once.
        columns = tuple(column.model_copy(update={"note": ""}) for column in columns)
    return tuple(found) or (Table(columns=columns, rows=()),)


def _ranked_row(row: RankRow) -> tuple[Cell, ...]:
    name = row.name if row.seeds == 1 else f"{row.name}, {row.seeds} seeds"
    perplexity = math.exp(min(row.nll, 690.0))
    return (name, row.nll, perplexity, interval(row.rise), _share(row.removed), interval(row.against_frequency))


def _inside_row(row: RankRow) -> tuple[Cell, ...]:
    return (row.name, row.reconstruction, row.lost_tokens, row.seeds, row.spread, row.seconds)


def _share(share: Share | None) -> Cell:
    if share is None:
        return None
    if share.low is None or share.high is None:
        return share.mean
    return Interval(mean=share.mean, low=share.low, high=share.high)


def tasks_section(result: PruneBenchResult) -> TableSection:
    """For each task: methods that saw only its text against the same methods on all text."""
    columns: tuple[Column, ...] = (
        Column(name="method"),
        Column(name="own text, on the task", digits=3, note="decided from the task's text alone, measured on it"),
        Column(name="all text, on the task", digits=3),
        Column(name="gain", digits=3, signed=True, note="all text minus own text: what knowing the task is worth"),
        Column(name="own text, elsewhere", digits=3, note="what it costs on all other domains"),
        Column(name="all text, elsewhere", digits=3),
    )
    tables: list[Table] = []
    for domain in result.setting.domains:
        for keep in result.setting.keep:
            rows: list[tuple[Cell, ...]] = []
            for name in _order(result):
                own, whole, off, spread = (
                    mean_nll(result, name, keep, calibration, text)
                    for text in (domain, NOT + domain)
                    for calibration in (domain, ALL)
                )
                if own is not None and whole is not None:
                    rows.append((name, own, whole, whole - own, off, spread))
            base = part(result.unchanged, domain)
            if rows and any(base.tokens):
                caption = f"{domain}, {keep_name(keep)}; unchanged {base.overall.nll:.3f} on the task"
                rows.sort(key=lambda row: float(row[1]))  # type: ignore[arg-type]
                tables.append(Table(columns=columns, rows=tuple(rows), caption=caption))
                columns = tuple(column.model_copy(update={"note": ""}) for column in columns)
    return TableSection(
        title="For one task",
        lead="A method that sees only the text of one task keeps that task's experts. It should cost less there, and "
        f"more elsewhere. Loss in nats a token; {RANDOM} sees no text, so that its gain is zero.",
        tables=tuple(tables) or (Table(columns=columns, rows=()),),
    )


def layers_section(result: PruneBenchResult) -> LinesSection | None:
    """How much each layer's output changes; None where nothing was measured."""
    names = _groups(result)[0]
    charts = []
    for ranking in reversed(whole(result)):
        series = [
            Series(name=name, points=points)
            for name in names
            if (points := _by_layer(result.select(name, ranking.keep)))
        ]
        if series:
            charts.append(
                LineChart(
                    title=keep_name(ranking.keep),
                    x=Axis(label="decoder layer"),
                    y=Axis(label="output changed, ||Z' - Z|| / ||Z||", zero=True),
                    series=tuple(series),
                )
            )
    if not charts:
        return None
    return LinesSection(
        title="Where it shows, layer by layer",
        lead="How far each layer's output moves when only its own experts are dropped, on held-out text: by random "
        "pruning and by the best methods. A layer that stands out is one to keep whole.",
        note="Each layer is given what the unchanged model gives it, so errors of layers below do not add up here; in "
        "the losses above they do.",
        charts=tuple(charts),
    )


def _by_layer(runs: Sequence[PruneRun]) -> tuple[Point, ...]:
    layers = sorted(runs[0].reconstruction) if runs else []
    return tuple(Point(x=layer, y=statistics.fmean(run.reconstruction[layer] for run in runs)) for layer in layers)


def how_section(result: PruneBenchResult) -> TextSection:
    """What was compared, for a reader who sees the page alone."""
    told = []
    for text in result.calibrations:
        parts = ", ".join(f"{tokens:,} of {domain}" for domain, tokens in text.domains.items())
        never = {layer: count for layer, count in text.never_routed.items() if count}
        which = "all text" if text.name == ALL else f"the text of {text.name} alone"
        line = f"Decided from {which}: {_documents(text)}, {text.tokens:,} tokens ({parts})."
        if never:
            most = max(never, key=lambda layer: never[layer])
            line += f" In {len(never)} of {len(text.never_routed)} layers some experts were never chosen "
            line += f"(most in layer {most}: {never[most]}); methods that count tokens rank them below all others."
        told.append(line)
    held = result.unchanged
    units = f"{held.overall.documents} held-out documents"
    if result.cuts:
        units += f" and passages ({'; '.join(f'{cut.domain}: {cut.words}' for cut in result.cuts)})"
    paragraphs = (
        "A router chooses a few of a layer's experts for each token. Pruning drops experts, and their rows of the "
        "router; tokens that would have chosen them choose others. A method says which experts go, from what it saw of "
        "the calibration text, which went through the model once for all methods together; some also rewrite what "
        "stays. Nothing is trained afterwards.",
        *told,
        f"Measured on {units}, {held.overall.tokens:,} tokens, in windows of "
        f"{result.setting.window} tokens; all variants walked the same text side by side. {RANDOM} and other methods "
        f"that draw numbers ran with {result.setting.seeds} seeds; {FREQUENCY} keeps the experts chosen most often.",
        *(f"{s.name} took no part ({s.calibration}): {s.reason}" for s in result.skipped),
    )
    return TextSection(title="How to read this, and how it was measured", paragraphs=paragraphs)


def _documents(text: CalibrationDraw) -> str:
    cut = "" if text.passages is None else f", cut into {text.passages} passages"
    return f"{text.documents} documents{cut}"
