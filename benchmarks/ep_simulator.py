"""Step time of expert parallelism on 8 to 1024 ranks, predicted from a trace: no GPU, no processes.

    python benchmarks/ep_simulator.py [--trace FOLDER] [--ranks 8,64,1024] [--bandwidth 900GB/s,50GB/s] [--json]

Rows and load are exact: tokens are dealt to ranks in order and replayed. Times are modelled as
alpha + bytes / bandwidth on the busiest port, and as every rank waiting for the slowest in every layer. Compute is told
by --expert-us, --dense-us and --shared-us (microseconds a row or token, forward), links by --bandwidth and --latency;
or links are fitted to measured exchanges with --intra-samples and --inter-samples, JSON lists of [bytes, seconds],
whose fit is printed with its error.

Without --trace routing is random: experts drawn without structure, weighted by a Zipf law for skew (--skew 0: uniform).
Such a trace shows what ranks and links do; how much placement saves, only a real trace tells.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from moekit.errors import MoekitError
from moekit.placement import (
    Placement,
    Topology,
    Workload,
    calibrated,
    fit_link,
    parse_latency,
    place_trace,
    predict_scaling,
)
from moekit.placement.fitting import LinkFit
from moekit.placement.scaling import RANKS
from moekit.trace.store import Trace, TraceMeta
from moekit.trace.tokens import TokenLabels


def random_trace(tokens: int, experts: int, top_k: int, hidden: int, skew: float, seed: int = 0) -> Trace:
    """One layer; expert e is drawn with a weight of (e' + 1) ** -skew, e' a random order of the experts."""
    generator = torch.Generator().manual_seed(seed)
    weight_E = (torch.arange(experts) + 1.0)[torch.randperm(experts, generator=generator)] ** -skew
    noise_NE = -torch.log(-torch.log(torch.rand(tokens, experts, generator=generator).clamp(1e-6, 1 - 1e-6)))
    indices_NK = (weight_E.log() + noise_NE).topk(top_k).indices
    number_N = torch.arange(tokens, dtype=torch.int32)
    labels = TokenLabels(
        sequence_N=number_N,
        document_N=number_N,
        domain_N=torch.zeros(tokens, dtype=torch.int16),
        position_N=torch.zeros(tokens, dtype=torch.int32),
        phase_N=torch.zeros(tokens, dtype=torch.uint8),
    )
    meta = TraceMeta(
        model=f"random routing: {top_k} of {experts} experts, skew {skew:g}, hidden {hidden}, one layer",
        layers=[0],
        experts=[experts],
        top_k=[top_k],
        hidden=hidden,
        tokens=tokens,
        has_choices=True,
        has_weights=False,
        domains=["random"],
    )
    return Trace(meta, labels, {0: indices_NK.to(torch.uint8 if experts <= 255 else torch.int16)})


def links(arguments: argparse.Namespace) -> tuple[Topology, dict[str, LinkFit]]:
    topology = Topology.make(1, 1, arguments.bandwidth, latency=parse_latency(arguments.latency))
    files = {"intra": arguments.intra_samples, "inter": arguments.inter_samples}
    fits = {name: fit_link(json.loads(file.read_text())) for name, file in files.items() if file is not None}
    return calibrated(topology, **fits), fits


def print_table(head: list[str], rows: list[list[str]]) -> None:
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
    print()


def show(results: dict[str, Any]) -> None:
    print(f"trace: {results['trace']}, {results['trace_tokens']} tokens")
    if results["repeated"]:
        print(f"repeated on {results['repeated']} ranks, for which it is too short")
    topology, work = results["topology"], results["workload"]
    for name in ("intra", "inter"):
        fit = results["fits"].get(name)
        error = f"; fitted, relative error {fit['mean']:.1%} in the mean, {fit['worst']:.1%} at worst" if fit else ""
        latency = topology[f"{name}_latency"] * 1e6
        print(f"{name}: {topology[name] / 1e9:.3g} GB/s, {latency:.3g} us before the first byte{error}")
    micro = {name: work[f"{name}_seconds"] * 1e6 for name in ("expert", "dense", "shared")}
    print(
        f"{work['tokens_per_rank']} tokens a rank; microseconds: {micro['expert']:g} a choice, {micro['dense']:g} a "
        f"token in dense layers, {micro['shared']:g} in shared experts, which hide rows to {work['overlap']:.0%}; "
        f"backward {work['backward']:g} times the compute; placement {results['placement']}\n"
    )
    head = ["dispatch", "ranks", "nodes", "step ms", "vs first", "experts", "waiting", "exchange", "hidden"]
    head += ["exposed", "MB inside", "MB across", "max/mean"]
    first = {step["ranks"]: step["seconds"] for step in reversed(results["steps"])}
    rows = [
        [
            step["dispatch"],
            str(step["ranks"]),
            str(step["nodes"]),
            f"{step['seconds'] * 1e3:.2f}",
            f"{step['seconds'] / first[step['ranks']]:.3f}",
            *(f"{step[name] * 1e3:.2f}" for name in ("experts", "waiting", "exchange", "hidden")),
            f"{step['exposed']:.1%}",
            *(f"{step[name] / step['ranks'] / 1e6:.2f}" for name in ("bytes_intra", "bytes_inter")),
            f"{step['max_over_mean']:.3f}",
        ]
        for step in results["steps"]
    ]
    print("a step, all layers, forward and backward; times in ms, MB a rank; experts: of the slowest rank")
    print_table(head, rows)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.trace is not None:
        trace = Trace.load(arguments.trace)
    else:
        trace = random_trace(
            arguments.tokens, arguments.experts, arguments.top_k, arguments.hidden, arguments.skew, arguments.seed
        )
    topology, fits = links(arguments)
    fewest = min(trace.meta.experts)
    # Ranks that were asked for and have no expert are refused; of the default ones only those that have are taken.
    ranks = [int(part) for part in arguments.ranks.split(",")] if arguments.ranks else [n for n in RANKS if n <= fewest]
    work = Workload(
        tokens_per_rank=arguments.tokens_per_rank,
        expert_seconds=arguments.expert_us * 1e-6,
        dense_seconds=arguments.dense_us * 1e-6,
        shared_seconds=arguments.shared_us * 1e-6,
        overlap=arguments.overlap,
        backward=arguments.backward,
    )

    def place(devices: int, nodes: int) -> Placement:
        return place_trace(trace, devices, solver=arguments.placement, nodes=nodes, bound=False)

    steps = predict_scaling(
        trace,
        topology,
        work,
        ranks=ranks,
        per_node=arguments.per_node,
        place=None if arguments.placement == "contiguous" else place,
        steps=arguments.steps,
    )
    needed = arguments.tokens_per_rank * arguments.steps
    return {
        "trace": trace.meta.model or str(arguments.trace),
        "trace_tokens": trace.meta.tokens,
        "repeated": [count for count in ranks if count * needed > trace.meta.tokens],
        "topology": topology.model_dump(),
        "fits": {name: {"mean": fit.mean, "worst": fit.worst, "errors": fit.errors} for name, fit in fits.items()},
        "workload": work.model_dump(),
        "placement": arguments.placement,
        "steps": [step.as_dict() for step in steps],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="trace folder; random routing by default")
    parser.add_argument("--ranks", help="numbers of ranks; by default 8 to 1024, as far as experts suffice")
    parser.add_argument("--per-node", type=int, default=8, help="ranks of a node")
    parser.add_argument("--bandwidth", default="900GB/s,50GB/s", help="inside a node, across nodes")
    parser.add_argument("--latency", default="5us,20us", help="inside a node, across nodes")
    parser.add_argument("--intra-samples", type=Path, help="JSON list of [bytes, seconds] measured inside a node")
    parser.add_argument("--inter-samples", type=Path, help="the same across nodes")
    parser.add_argument("--tokens-per-rank", type=int, default=256, help="of a step")
    parser.add_argument("--steps", type=int, default=1, help="steps to average")
    parser.add_argument("--placement", default="contiguous", help="solver; contiguous, random, greedy, swap")
    parser.add_argument("--expert-us", type=float, default=0.4, help="microseconds of one choice, forward")
    parser.add_argument(
        "--dense-us", type=float, default=1.0, help="microseconds of one token in dense layers, forward"
    )
    parser.add_argument("--shared-us", type=float, default=0.4, help="microseconds of one token in shared experts")
    parser.add_argument("--overlap", type=float, default=1.0, help="share of that time that hides rows")
    parser.add_argument("--backward", type=float, default=2.0, help="backward compute over forward; 0: inference")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the random trace")
    parser.add_argument("--experts", type=int, default=1024, help="of the random trace")
    parser.add_argument("--top-k", type=int, default=8, help="of the random trace")
    parser.add_argument("--hidden", type=int, default=2048, help="of the random trace")
    parser.add_argument("--skew", type=float, default=0.3, help="of the random trace")
    parser.add_argument("--seed", type=int, default=0, help="of the random trace")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    arguments = parser.parse_args()
    try:
        results = run(arguments)
    except MoekitError as error:
        parser.exit(error.exit_code, f"{error}\n")
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)


if __name__ == "__main__":
    main()
