"""Rows against load at scale: swap search with several weights of the load term, against EPLB without copies.

    python benchmarks/placement_load.py [--seeds 1] [--json]

Routing is drawn: sixteen topics of Zipf popularity, each with experts of its own liking, and an expert's general
popularity. Placements are made from one half of the tokens and replayed on the other. Rows are per token, once per
device and once per node; load is that of the busiest device over the mean; bound is what no placement can exceed in the
objective (rows spared, minus the load term).
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from moekit.placement.plan import Placement
from moekit.placement.planning import place
from moekit.placement.redundancy import place_by_load
from moekit.placement.replaying import replay

# Experts, choices a token, tokens, devices, nodes.
CASES = (
    (16, 4, 8_000, 4, 1),
    (32, 4, 8_000, 8, 1),
    (64, 8, 8_000, 16, 4),
    (128, 8, 8_000, 32, 4),
    (256, 8, 20_000, 64, 8),
)
WEIGHTS = (0.0, 0.1, 0.5, 1.0)
TOPICS = 16


def routing(experts: int, top_k: int, tokens: int, seed: int) -> torch.Tensor:
    """Choices [N, K]."""
    g = torch.Generator().manual_seed(seed)
    liking_te = 1.5 * torch.randn(TOPICS, experts, generator=g)
    popular_e = 0.5 * torch.randn(experts, generator=g)
    zipf_t = 1 / torch.arange(1, TOPICS + 1)
    topic_n = torch.multinomial(zipf_t / zipf_t.sum(), tokens, replacement=True, generator=g)
    return (liking_te[topic_n] + popular_e + torch.randn(tokens, experts, generator=g)).topk(top_k).indices


def row(name: str, placement: Placement, seen: torch.Tensor, seconds: float) -> dict[str, Any]:
    """What a placement sends on tokens that it was not planned on."""
    counted = replay(seen, placement.holders(0), placement.devices, nodes=placement.nodes)
    return {
        "placement": name,
        "rows": counted.rows_once_per_device / counted.tokens,
        "rows_nodes": counted.rows_once_per_node / counted.tokens,
        "load": counted.max_over_mean,
        "value": placement.objective.get(0, float("nan")),
        "bound": (placement.bound or {}).get(0, float("nan")),
        "cpu_seconds": seconds,
    }


def rows_of(experts: int, top_k: int, tokens: int, devices: int, nodes: int, seed: int) -> list[dict[str, Any]]:
    """All placements of one case."""
    chosen = routing(experts, top_k, tokens, seed)
    planned, seen = chosen.chunk(2)
    hot = torch.zeros(len(planned), experts, dtype=torch.float64).scatter_(1, planned, 1.0)
    pairs = (hot.T @ hot).long()
    load = pairs.diagonal().clone()
    found = []
    for name, solver, config in [
        ("contiguous", "contiguous", {}),
        *((f"swap, load_weight {weight}", "swap", {"load_weight": weight}) for weight in WEIGHTS),
    ]:
        started = time.process_time()
        made = place(
            {0: pairs}, devices, solver=solver, config=config, load={0: load}, choices={0: planned}, nodes=nodes
        )
        found.append(row(name, made, seen, time.process_time() - started))
    started = time.process_time()
    balanced = place_by_load({0: load}, devices, nodes=nodes)
    return [*found, row("EPLB", balanced, seen, time.process_time() - started)]


def main() -> None:
    """Print a table for every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="draws of the routing")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for experts, top_k, tokens, devices, nodes in CASES:
        for seed in range(arguments.seeds):
            case = f"{experts} experts, top-{top_k}, {devices} devices in {nodes} nodes, seed {seed}"
            rows = rows_of(experts, top_k, tokens, devices, nodes, seed)
            results.append({"case": case, "rows": rows})
            if not arguments.json:
                print(f"{case}\n{'':26}rows   across nodes   max/mean load   value   bound   CPU s")
                for r in rows:
                    numbers = (r["rows"], r["rows_nodes"], r["load"], r["value"], r["bound"], r["cpu_seconds"])
                    print(f"  {r['placement']:22}" + "".join(f"{n:9.3f}" for n in numbers))
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
