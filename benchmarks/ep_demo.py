"""What each step of C2R saves on the demo's MoE: bytes, step time on a shaped link, load and perplexity in one table.

Reads a finished run of recipes/c2r-demo.yaml (`make demo`) and measures with four ranks in two nodes: once per expert,
once per rank, with a placement, and under C2R for several T and in device mode, each with its own placement, planned
node first on other text. Choices are those of the tuned models on held-out text, weights those of the plain one; bytes
between nodes and time are of one MoE layer, forward and backward. Ratios are paired round by round with once per
expert, with 95 % intervals. Perplexity is the run's own, paired over documents with plain top-k.

    python benchmarks/ep_demo.py [--run runs/demo] [--rate 200Mbit/s] [--rounds 20] [--layer-count 1] [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import moekit
from moekit.bench.dispatch.harness import run_bench
from moekit.bench.dispatch.network import name_rate, read_rate
from moekit.bench.dispatch.result import BenchResult, EntryResult, paired_ratio
from moekit.bench.dispatch.setting import BASELINE, DispatchBenchSetting, Entry
from moekit.bench.dispatch.sources import make_source
from moekit.placement import Placement, place_trace
from moekit.report.results import load_comparison
from moekit.report.sections.evaluations import relative
from moekit.trace import Trace

RANKS, NODES = 4, 2
LOAD_WEIGHT = 0.1


def constrained(run: Path) -> dict[str, str]:
    """Name of the routing -> suffix of its folders: "T = 3" -> "t3"."""
    found = {f"T = {folder.name[7:]}": folder.name[6:] for folder in sorted(run.glob("trace-t*"))}
    return found | ({f"device, D = {RANKS}": f"device-{RANKS}"} if (run / f"trace-device-{RANKS}").is_dir() else {})


def planned(run: Path, suffix: str) -> Placement:
    """Where experts stand, planned on text that nothing is judged by."""
    if suffix.startswith("device"):
        return Placement.load(run / "place" / f"placement-{RANKS}.json")
    look = Trace.load(run / f"look-{suffix}" if suffix else run / "look")
    return place_trace(look, RANKS, nodes=NODES, config={"load_weight": LOAD_WEIGHT}, seed=0)


def cost(run: Path, suffix: str) -> str:
    """Perplexity against plain top-k."""
    if not suffix:
        return "0"
    difference = load_comparison(run / f"eval-{suffix}").overall
    change = relative(None if difference is None else difference.difference)
    return "-" if change is None else f"{change.mean:+.2%} [{change.low:+.2%}, {change.high:+.2%}]"


def measure(run: Path, rate: float | None, rounds: int, layers: int) -> tuple[BenchResult, dict[str, str]]:
    """Everything in one bench, and which suffix each entry has."""
    routings = {"": ""} | constrained(run)
    traces = {"plain": Trace.load(run / "trace")}
    placements = {"placed": planned(run, "")}
    entries = [BASELINE, *(Entry(peer="ours", variant=v) for v in ("once-per-expert", "once-per-rank"))]
    entries += [Entry(peer="ours", variant=v, placement="placed") for v in ("once-per-rank", "hierarchical")]
    suffixes = {entry.name: "" for entry in entries}
    for name, suffix in routings.items():
        if suffix:
            traces[name], placements[f"placed for {name}"] = Trace.load(run / f"trace-{suffix}"), planned(run, suffix)
            for variant in ("once-per-rank", "hierarchical"):
                entry = Entry(peer="ours", variant=variant, routing=name, placement=f"placed for {name}")
                entries.append(entry)
                suffixes[entry.name] = suffix
    model = moekit.load(run / "tuned", device="cpu", dtype="float32", parts=False)
    source = make_source(
        DispatchBenchSetting(ranks=RANKS, nodes=NODES, tokens=512),
        model=model,
        traces=traces,
        placements=placements,
        layers=layers,
    )
    result = run_bench(
        source.work, entries=entries, layouts=source.layouts, rates=[rate], rounds=rounds, source=source.text
    )
    return result, suffixes


def line(e: EntryResult, base: EntryResult, rate: float | None, price: str) -> str:
    """One row of the table."""
    assert e.total is not None
    assert base.total is not None
    assert e.exactness is not None
    mine, theirs = e.at(rate), base.at(rate)
    assert mine is not None
    assert theirs is not None
    sent, most = (sum(part.sent or part.counted or ()) for part in (e.total, base.total))
    ratio = "1"
    if e is not base:
        rounds = min(len(mine.total), len(theirs.total))
        found = paired_ratio(mine.total[:rounds], theirs.total[:rounds])
        ratio = f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]"
    rows = "-" if e.rows is None else f"{e.rows.counted:,}{'' if e.rows.alike else ' (replay differs)'}"
    return (
        f"| {e.name.removeprefix('moekit ')} | {sent / 1024:,.0f} | {sent / most:.3f} | {rows} | {mine.total_ms:.0f} | "
        f"{ratio} | {e.load or 0:.2f} | {e.exactness.share:.0%} | {price} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--rate", default="200Mbit/s")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layer-count", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rate = read_rate(given.rate)
    result, suffixes = measure(given.run, rate, given.rounds, given.layer_count)
    if given.json is not None:
        given.json.write_text(result.model_dump_json(indent=1))
    s = result.setting
    print(
        f"{result.source}: {s.ranks} ranks in {s.nodes} nodes, T={s.tokens} H={s.hidden} E={s.experts} K={s.top_k}, "
        f"{name_rate(rate)}, {result.rounds} rounds, {result.date[:10]}, {result.machine['processor']} x "
        f"{result.machine['cores']}, {result.seconds:.0f} s"
    )
    print("| way | KiB across | / once per expert | rows | ms | ratio of times | busiest / mean | exact | perplexity |")
    print("|" + "---|" * 9)
    base = result.find("moekit once-per-expert")
    for entry in result.entries:
        if not entry.skipped:
            print(line(entry, base, rate, cost(given.run, suffixes[entry.name])))
    for note in result.notes:
        print(note)


if __name__ == "__main__":
    main()
