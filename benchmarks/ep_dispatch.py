"""Expert parallelism side by side over a shaped link: bytes, exactness and time, ours against every peer installed.

    python benchmarks/ep_dispatch.py                       # the whole table: 200 Mbit/s, 1 Gbit/s, unshaped
    python benchmarks/ep_dispatch.py --only once-per-rank --rounds 20 --rate 200Mbit/s,none   # with the baseline
    python benchmarks/ep_dispatch.py --routing skewed --seed 1 --json out.json
    python benchmarks/ep_dispatch.py --profile --only once-per-rank,hierarchical --rate 200Mbit/s

4 ranks stand in 2 nodes (network namespaces, tc tbf; needs root, else the link is modelled and says so). 512 tokens a
rank, hidden size 256, 16 SwiGLU experts of width 128, 4 a token, fp32, the same weights, tokens and choices for all.
All take turns in the same processes, in another order each round; a round lasts as long as its slowest rank. KiB left
node 0 in one step by its device's counter. Ratios are paired with transformers' all_to_all, with 95 % intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moekit.bench.dispatch.competitors.base import all_entries, peer_class
from moekit.bench.dispatch.harness import run_bench, start
from moekit.bench.dispatch.network import name_rate, read_rate
from moekit.bench.dispatch.result import BenchResult, Ratio
from moekit.bench.dispatch.setting import BASELINE, DispatchBenchSetting, Entry
from moekit.bench.dispatch.workload import Workload, make_layer


def show(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first = row[0].ljust(widths[0])
        print("  ".join([first, *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip())
    print()


def _ratio(ratio: Ratio | None) -> str:
    return "1" if ratio is None else f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def print_result(result: BenchResult) -> None:
    s = result.setting
    print(
        f"{result.source}: {s.ranks} ranks in {s.nodes} nodes, T={s.tokens} H={s.hidden} E={s.experts} I={s.width} "
        f"K={s.top_k}, {s.routing}, {result.rounds} rounds, {result.date}, {result.machine['processor']} x "
        f"{result.machine['cores']}, {result.seconds:.0f} s"
    )
    head = ["bytes, exactness", "fwd KiB", "fwd+bwd KiB", "/ base", "counted KiB", "own KiB", "calls", "exact", "error"]
    rows = [[*head, "grad error", "rows", "as replayed", "load"]]
    base = result.baseline
    for e in result.entries:
        if e.skipped or e.forward is None or e.total is None or e.exactness is None:
            print(f"{e.name}: skipped, {e.skipped}")
            continue
        sent, both = e.forward.sent or e.forward.counted, e.total.sent or e.total.counted
        whole = (base.total.sent or base.total.counted) if base and base.total else None
        rows.append(
            [
                e.name + (" (one batch)" if e.shared_batch else ""),
                f"{sent[0] / 1024:.0f}" if sent else "-",
                f"{both[0] / 1024:.0f}" if both else "-",
                f"{sum(both) / sum(whole):.3f}" if both and whole else "-",
                f"{e.total.counted[0] / 1024:.0f}" if e.total.counted else "-",
                f"{e.total.own[0] / 1024:.0f}" if e.total.own else "-",
                str(e.total.calls),
                f"{e.exactness.share:.1%}",
                f"{e.exactness.error:.1e}",
                f"{e.exactness.worst_gradient:.1e}",
                str(e.rows.counted) if e.rows else "-",
                ("yes" if e.rows.alike else f"NO ({e.rows.replayed})") if e.rows else "-",
                f"{e.load:.2f}",
            ]
        )
    show(rows)
    for rate in result.rates:
        rows = [[name_rate(rate), "fwd ms", "ratio", "fwd+bwd ms", "ratio"]]
        for e in result.entries:
            t = e.at(rate)
            if t is not None:
                rows.append(
                    [
                        e.name,
                        f"{t.forward_ms:.1f}",
                        _ratio(t.forward_ratio),
                        f"{t.total_ms:.1f}",
                        _ratio(t.total_ratio),
                    ]
                )
        show(rows)
    for note in result.notes:
        print(note)


def print_profile(work: Workload, entries: list[Entry], rates: list[float | None], rounds: int) -> None:
    taking = [entry for entry in entries if peer_class(entry.peer).why_not(work.setting, entry) is None]
    with start(work, taking, {}, None) as bench:
        for rate in rates:
            bench.network.shape(rate)
            for number, entry in enumerate(taking):
                found = bench.team.ask("profile", number=number, rounds=rounds)[0]
                print(f"{entry.name}, {name_rate(rate)}, rank 0: forward {found['forward']:.1f} ms, ", end="")
                print(f"forward and backward {found['total']:.1f} ms")
                for name, ms in found["phases"].items():
                    print(f"  {ms:8.2f} ms  {ms / found['total']:6.1%}  {name}")
                for name, ms, calls in found["operations"]:
                    print(f"  {ms:8.2f} ms  x{calls:<4} {name}")
                print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="200Mbit/s,1Gbit/s,none")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--routing", choices=["uniform", "skewed"], default="uniform")
    parser.add_argument("--only", default="", help="variants beside the baseline, such as once-per-rank,no-drop")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead of the table")
    args = parser.parse_args()
    work = make_layer(DispatchBenchSetting(routing=args.routing, seed=args.seed, tokens=args.tokens))
    entries = list(all_entries())
    if args.only:
        wanted = set(args.only.split(","))
        known = {entry.variant for entry in entries}
        entries = [e for e in entries if e == BASELINE or e.variant in wanted]
        entries += [Entry(peer="ours", variant=name) for name in wanted - known]
    rates = [read_rate(text) for text in args.rate.split(",")]
    if args.profile:
        print_profile(work, entries, rates, args.rounds)
        return
    result = run_bench(work, entries=entries, rates=rates, rounds=args.rounds)
    print_result(result)
    if args.json:
        args.json.write_text(result.model_dump_json(indent=1))


if __name__ == "__main__":
    main()
