"""`moekit bench`: measure ways to do the same, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _bench_prune
from moekit.cli._command import build_command, build_group
from moekit.cli._options import out_option
from moekit.cli._terminal import Terminal
from moekit.errors import BadConfig

if TYPE_CHECKING:
    from moekit.bench.dispatch.result import BenchResult, Ratio
    from moekit.bench.dispatch.setting import DispatchBenchSetting, Entry
    from moekit.bench.dispatch.sources import LayerSource

# Beyond it a bench is cut short by fewer rounds, and says so.
MINUTES = 9.0


def ep(
    terminal: Terminal,
    model: Annotated[
        str | None, typer.Argument(help="MoE whose experts are measured; a made-up layer without", show_default=False)
    ] = None,
    out: Annotated[Path, out_option("folder of the page and of bench.json", show_default=True)] = Path("bench-ep"),
    trace: Annotated[
        str | None,
        typer.Option(help="traces whose choices are sent, comma-separated; further ones, such as C2R's, by ours alone"),
    ] = None,
    placement: Annotated[str | None, typer.Option(help="placement files, comma-separated; for ours alone")] = None,
    rate: Annotated[str, typer.Option(help="of the link between nodes, comma-separated")] = "200Mbit/s,1Gbit/s,none",
    rounds: Annotated[int, typer.Option(min=2, help="of each rate; intervals of ratios want 20")] = 20,
    only: Annotated[
        str | None, typer.Option(help="variants beside transformers' all_to_all, such as once-per-rank,no-drop")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="MoE layers that one step goes through, evenly spaced")] = 1,
    ranks: Annotated[int, typer.Option(min=2, max=8, help="processes")] = 4,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="of each rank; 512, with a model 256", show_default=False)
    ] = None,
    routing: Annotated[str, typer.Option(help="without a trace: uniform or skewed (two hot experts)")] = "uniform",
    hidden: Annotated[int, typer.Option(min=8, help="hidden size of the made-up layer")] = 256,
    experts: Annotated[int, typer.Option(min=2, help="experts of the made-up layer")] = 16,
    width: Annotated[int, typer.Option(min=8, help="width of its experts")] = 128,
    top_k: Annotated[int, typer.Option(min=1, help="experts a token")] = 4,
    shaped: Annotated[
        bool | None,
        typer.Option("--shaped/--no-shaped", help="network namespaces (root) or a modelled link", show_default="auto"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace its own files in the folder; others stay")
    ] = False,
) -> None:
    """Measure every dispatcher, and every peer that is installed, on one machine with a link of a known rate.

    Ranks stand in two nodes; all take turns in the same processes, with the same weights, tokens and choices. The page
    shows bytes between nodes, exactness against one process, rows against the replay, and paired times.
    """
    from moekit.bench.dispatch.network import name_rate, read_rate

    rates = [read_rate(text) for text in rate.split(",")]
    tokens = tokens or (512 if model is None else 256)
    setting = _setting(terminal, ranks, tokens, routing, hidden, experts, width, top_k)
    if terminal.dry_run:
        _print_estimate(terminal, model, out, setting)
        return
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise BadConfig("the folder is not empty", file=out, hint="choose another one, or say --overwrite")
    from moekit.bench.dispatch.harness import run_bench

    source = _source(terminal, setting, model, trace, placement, layers)
    result = run_bench(
        source.work,
        entries=_entries(source, only),
        layouts=source.layouts,
        rates=rates,
        rounds=rounds,
        minutes=MINUTES,
        shaped=shaped,
        source=source.text,
        progress=terminal.progress,
    )
    page = _write(terminal, result, out)
    _show(terminal, result, [name_rate(r) for r in rates])
    terminal.answer(out=str(out), page=str(page), **result.model_dump(mode="json"))
    terminal.say(f"wrote {out}")


def _setting(
    terminal: Terminal, ranks: int, tokens: int, routing: str, hidden: int, experts: int, width: int, top_k: int
) -> DispatchBenchSetting:
    from pydantic import ValidationError

    from moekit.bench.dispatch.setting import DispatchBenchSetting
    from moekit.cli._errors import config_error

    try:
        return DispatchBenchSetting(
            ranks=ranks,
            tokens=tokens,
            routing=routing,
            hidden=hidden,
            experts=experts,
            width=width,
            top_k=top_k,
            seed=terminal.seed,
        )
    except ValidationError as error:
        raise config_error(error) from error


def _print_estimate(terminal: Terminal, model: str | None, out: Path, setting: DispatchBenchSetting) -> None:
    from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
    from moekit.jobs.shared.inputs import model_item

    reads = () if model is None else (model_item(model, ByteSizes()),)
    held = sum(item.nbytes or 0 for item in reads)
    tensors = setting.ranks * setting.tokens * setting.hidden * 4 * 32
    note = f"starts {setting.ranks} processes; about {MINUTES:g} minutes at most"
    terminal.estimate(
        JobEstimate(reads, (Item(str(out), 1 << 20),), disk=(1 << 20) + held, memory=3 * held + tensors, notes=(note,))
    )


def _source(
    terminal: Terminal,
    setting: DispatchBenchSetting,
    model: str | None,
    trace: str | None,
    placement: str | None,
    layers: int,
) -> LayerSource:
    from moekit.bench.dispatch.sources import make_source
    from moekit.placement import Placement
    from moekit.trace import Trace

    traces = {Path(path).resolve().name: Trace.load(path) for path in _split(trace)}
    placements = {_placement_name(path): Placement.load(path) for path in _split(placement)}
    live = None
    if model is not None:
        from moekit.checkpoint import fingerprint_model, load
        from moekit.jobs.shared.inputs import model_location

        terminal.note(f"reading {model}")
        live = load(model_location(model, terminal.progress), device="cpu", dtype="float32")
        fingerprint = fingerprint_model(live)
        for first in list(traces.values())[:1]:
            first.check_model(fingerprint)
    return make_source(setting, model=live, traces=traces, placements=placements, layers=layers)


def _split(text: str | None) -> list[str]:
    return [part for part in (text or "").split(",") if part]


def _placement_name(path: str) -> str:
    """Folder and file, as placements of several solvers have the same file name."""
    file = Path(path).resolve()
    return f"{file.parent.name}/{file.stem}"


def _entries(source: LayerSource, only: str | None) -> list[Entry]:
    from moekit.bench.dispatch.competitors.base import all_entries
    from moekit.bench.dispatch.setting import BASELINE

    entries = all_entries(list(source.layouts), list(source.work.choices))
    if only is None:
        return list(entries)
    wanted = set(_split(only))
    unknown = wanted - {entry.variant for entry in entries}
    if unknown:
        known = ", ".join(sorted({entry.variant for entry in entries}))
        raise BadConfig(f"{', '.join(sorted(unknown))} takes no part", hint=f"there are: {known}")
    return [entry for entry in entries if entry == BASELINE or entry.variant in wanted]


def _write(terminal: Terminal, result: BenchResult, out: Path) -> Path:
    from moekit.bench.dispatch.result import FILE
    from moekit.checkpoint import atomic_write
    from moekit.report import build as build_page
    from moekit.report.sections.dispatch import report

    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / FILE, result.model_dump_json(indent=1))
    page: Path = build_page(report(result, terminal.command), out)
    return page


def _show(terminal: Terminal, result: BenchResult, rates: list[str]) -> None:
    from moekit.report.sections.dispatch import across, headline, saved, taking

    rows = [
        (
            e.name,
            None if e.forward is None else round((across(e.forward) or 0) / 1024),
            None if e.total is None else round((across(e.total) or 0) / 1024),
            _percent(saved(e, result)),
            None if e.exactness is None else f"{e.exactness.share:.1%}",
            None if e.rows is None else e.rows.counted,
            None if e.rows is None else e.rows.alike,
        )
        for e in taking(result)
    ]
    columns = ("way to send", "forward KiB", "both KiB", "against all_to_all", "tokens exact", "rows", "as replayed")
    terminal.table("bytes between nodes, and exactness", columns, rows)
    for rate, name in zip(result.rates, rates, strict=True):
        timed = [(e.name, e.at(rate)) for e in taking(result)]
        lines = [
            (name, t.forward_ms, _ratio(t.forward_ratio), t.total_ms, _ratio(t.total_ratio)) for name, t in timed if t
        ]
        terminal.table(f"link: {name}", ("way to send", "forward ms", "ratio", "both ms", "ratio"), lines)
    for e in result.entries:
        if e.skipped:
            terminal.say(f"{e.name} took no part: {e.skipped}")
    for note in result.notes:
        terminal.say(note)
    terminal.say(headline(result).text)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:+.1%}"


def _ratio(ratio: Ratio | None) -> str:
    return "1" if ratio is None else f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def build() -> Any:
    """The command."""
    text = "Measure ways to do the same side by side: sending tokens, pruning."
    examples = ["moekit bench ep -o ./bench", "moekit bench prune ./moe --data ./text -o ./bench"]
    group = build_group(name="bench", help=text, examples=examples)
    command = build_command(
        ep,
        name="ep",
        examples=[
            "moekit bench ep -o ./bench",
            "moekit bench ep ./tuned --trace ./trace --placement ./place/placement-4.json -o ./bench",
            "moekit bench ep --routing skewed --only once-per-rank,cf=1,no-drop --rate 200Mbit/s -o ./bench",
        ],
    )
    group.add_command(command, "ep")
    group.add_command(_bench_prune.command(), "prune")
    return group
