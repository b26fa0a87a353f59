"""How good placements are and how long they take: real co-activation counts, a planted partition, a replayed trace.

    python benchmarks/placement.py [--counts FILE] [--trace FOLDER] [--seeds 3] [--json]

1. Solvers on the co-activation counts of LLaMA-MoE-3.5B (2 of 8 experts, 32 layers, 204,800 tokens each): mean f, the
   share of top-2 pairs on one device (rows sent per token = 2 - f), and largest device load over the mean. Further
   [L, E, E] matrices in `--counts` get a row each, and a column for what base's placement is worth on them.
2. 128 experts on 8 devices with a planted partition, experts shuffled: whether swap search finds it, the gap to the
   upper bound, seconds.
3. Replay: rows by every solver on `--trace`, or on random choices with structure; and its speed.
4. Graph partitioners as outside opponents, KaHIP (strong, imbalance 0) and METIS (imbalance 0.1 %), each where it is
   installed (`pip install -e '.[bench]'`): f, experts of the emptiest and fullest device, and seconds beside swap
   search on planted partitions. METIS keeps no equal sizes, which expert parallelism needs.
5. Writing a permuted checkpoint (verified and hashed) beside a plain copy of the folder, both flushed to disk,
   alternating: median seconds and their ratio.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from moekit.checkpoint.model import save
from moekit.checkpoint.record import Record
from moekit.placement.apply import place_checkpoint
from moekit.placement.comparison import compare_solvers
from moekit.placement.objective import intra_share
from moekit.placement.planning import place
from moekit.placement.replaying import replay
from moekit.placement.solver import Solution, Solver
from moekit.placement.solvers.contiguous import Contiguous
from moekit.placement.solvers.exact import Exact
from moekit.placement.solvers.greedy import Greedy
from moekit.placement.solvers.random import Random
from moekit.placement.solvers.swap import Swap
from moekit.trace.store import Trace, TraceMeta
from moekit.trace.tokens import TokenLabels

COUNTS = Path(__file__).parents[1] / "tests" / "fixtures" / "llama-moe-coactivation.safetensors"
SOLVERS: dict[str, Solver] = {
    "contiguous": Contiguous(load_weight=0),
    "random": Random(load_weight=0),
    "greedy": Greedy(load_weight=0),
    "swap, no random starts": Swap(load_weight=0, starts=0, perturbations=0),
    "swap": Swap(load_weight=0),
    "exact": Exact(load_weight=0),
    "exact (milp)": Exact(load_weight=0, method="milp"),
}


def print_table(head: list[str], rows: list[list[Any]]) -> None:
    cells = [head, *[[f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    print()


def solver_rows(counts_LEE: torch.Tensor, devices: int) -> list[dict[str, Any]]:
    solutions: dict[str, list[Solution]] = {}
    seconds: dict[str, float] = {}
    for name, solver in SOLVERS.items():
        started = time.perf_counter()
        solutions[name] = [solver.solve(c, devices) for c in counts_LEE]
        seconds[name] = time.perf_counter() - started
    best = [s.value for s in solutions["exact"]]
    return [
        {
            "devices": devices,
            "solver": name,
            "f": float(np.mean([s.value for s in found])),
            "rows_per_token": 2 - float(np.mean([s.value for s in found])),
            "max_over_mean": float(np.mean([s.imbalance for s in found])),
            "optimal_layers": sum(s.value >= b - 1e-9 for s, b in zip(found, best, strict=True)),
            "gap_to_bound": float(np.mean([s.gap for s in found if s.gap is not None])),
            "seconds": seconds[name],
        }
        for name, found in solutions.items()
    ]


def matrix_rows(matrices: Mapping[str, torch.Tensor], devices: int) -> list[dict[str, Any]]:
    """Each matrix: contiguous, its own optimum, and the optimum of `base` applied to it."""
    of_base = [Exact(load_weight=0).solve(c, devices).groups for c in matrices["base"]]
    rows = []
    for name, counts_LEE in matrices.items():
        order = [Contiguous(load_weight=0).solve(c, devices) for c in counts_LEE]
        best = [Exact(load_weight=0).solve(c, devices) for c in counts_LEE]
        carried = [intra_share(c, groups) for c, groups in zip(counts_LEE, of_base, strict=True)]
        shared = place(
            dict(enumerate(counts_LEE)),
            devices,
            solver="exact",
            per_layer=False,
            bound=False,
            config={"load_weight": 0},
        )
        alike = [intra_share(c, shared.layers[n]) for n, c in enumerate(counts_LEE)]
        rows.append(
            {
                "matrix": name,
                "devices": devices,
                "contiguous": float(np.mean([s.value for s in order])),
                "contiguous_load": float(np.mean([s.imbalance for s in order])),
                "best": float(np.mean([s.value for s in best])),
                "best_load": float(np.mean([s.imbalance for s in best])),
                "base_placement": float(np.mean(carried)),
                "one_for_all_layers": float(np.mean(alike)),
            }
        )
    return rows


def planted(experts: int, devices: int, inside: float, outside: float, seed: int) -> tuple[torch.Tensor, list[int]]:
    """Poisson counts with means `inside` and `outside` the blocks of a shuffled partition."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(devices), experts // devices))
    upper_EE = np.triu(rng.poisson(np.where(truth[:, None] == truth[None, :], inside, outside)), 1)
    return torch.tensor(upper_EE + upper_EE.T), truth.tolist()


def planted_rows(seeds: int) -> list[dict[str, Any]]:
    rows = []
    for inside, outside in [(20, 1), (20, 5), (10, 5), (8, 5)]:
        for seed in range(seeds):
            counts, truth = planted(128, 8, inside, outside, seed)
            found = Swap(load_weight=0).solve(counts, 8, seed=seed)
            gap = found.gap
            assert gap is not None
            rows.append(
                {
                    "inside": inside,
                    "outside": outside,
                    "seed": seed,
                    "recovered": len(set(zip(found.groups, truth, strict=True))) == 8,
                    "planted_f": intra_share(counts, truth),
                    "found_f": found.value,
                    "bound": found.bound,
                    "gap": gap,
                    "gap_percent": 100 * gap / found.value,
                    "seconds": found.seconds,
                }
            )
    return rows


def as_graph(counts_EE: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    """Neighbours and edge weights in compressed rows, as partitioners take them."""
    rows, starts, neighbours, weights = counts_EE.tolist(), [0], list[int](), list[int]()
    for expert, row in enumerate(rows):
        linked = [other for other, weight in enumerate(row) if weight and other != expert]
        neighbours += linked
        weights += [int(row[other]) for other in linked]
        starts.append(len(neighbours))
    return starts, neighbours, weights


def by_kahip(counts_EE: torch.Tensor, devices: int, seed: int) -> list[int]:
    import kahip

    starts, neighbours, weights = as_graph(counts_EE)
    ones = [1] * len(counts_EE)
    _, groups = kahip.kaffpa(ones, starts, weights, neighbours, devices, 0.0, True, seed, kahip.STRONG)
    return list(groups)


def by_metis(counts_EE: torch.Tensor, devices: int, seed: int) -> list[int]:
    import pymetis

    starts, neighbours, weights = as_graph(counts_EE)
    options = pymetis.Options(ufactor=1, seed=seed)
    cut = pymetis.part_graph(devices, xadj=starts, adjncy=neighbours, eweights=weights, options=options)
    return list(cut.vertex_part)


def by_swap(counts_EE: torch.Tensor, devices: int, seed: int) -> list[int]:
    return list(Swap(load_weight=0).solve(counts_EE, devices, seed=seed).groups)


OPPONENTS = {"swap": ("moekit", by_swap), "KaHIP": ("kahip", by_kahip), "METIS": ("pymetis", by_metis)}


def opponent_rows(seeds: int) -> list[dict[str, Any]]:
    """Our search and graph partitioners on the same counts, in turns."""
    rows = []
    for experts, devices, inside, outside in [(64, 8, 10, 5), (128, 8, 10, 5), (128, 8, 8, 5), (256, 32, 8, 5)]:
        found: dict[str, list[tuple[float, int, int, float]]] = {}
        for seed in range(seeds):
            counts, _ = planted(experts, devices, inside, outside, seed)
            for name, (module, solve) in OPPONENTS.items():
                if importlib.util.find_spec(module) is None:
                    continue
                started = time.perf_counter()
                groups = solve(counts, devices, seed)
                seconds = time.perf_counter() - started
                sizes = np.bincount(groups, minlength=devices)
                found.setdefault(name, []).append((intra_share(counts, groups), sizes.min(), sizes.max(), seconds))
        for name, runs in found.items():
            f, least, most, seconds = (np.array(column) for column in zip(*runs, strict=True))
            row = {"experts": experts, "devices": devices, "inside": inside, "outside": outside, "solver": name}
            sizes_told = f"{least.min()} to {most.max()}"
            rows.append(row | {"f": float(f.mean()), "experts_a_device": sizes_told, "seconds": float(seconds.mean())})
    return rows


def random_trace(tokens: int, experts: int, top_k: int, layers: int) -> Trace:
    """Choices decided by three hidden directions and noise, in 64 documents."""
    g = torch.Generator().manual_seed(0)
    choices = {}
    for layer in range(layers):
        noise_NE = -torch.log(-torch.log(torch.rand(tokens, experts, generator=g).clamp(1e-6, 1 - 1e-6)))
        z_NE = 1.5 * torch.randn(tokens, 3, generator=g) @ torch.randn(3, experts, generator=g) + noise_NE
        choices[layer] = z_NE.topk(top_k).indices.to(torch.uint8)
    document_N = (torch.arange(tokens) * 64 // tokens).int()
    labels = TokenLabels(
        sequence_N=document_N,
        document_N=document_N,
        domain_N=torch.zeros(tokens, dtype=torch.int16),
        position_N=torch.arange(tokens, dtype=torch.int32),
        phase_N=torch.zeros(tokens, dtype=torch.uint8),
    )
    meta = TraceMeta(
        model=f"random choices, {top_k} of {experts}",
        layers=list(choices),
        experts=[experts] * layers,
        top_k=[top_k] * layers,
        hidden=1,
        tokens=tokens,
        has_choices=True,
        has_weights=False,
        domains=["all"],
    )
    return Trace(meta, labels, choices)


def replay_speed() -> list[dict[str, Any]]:
    rows = []
    for experts, top_k, devices in [(32, 4, 8), (64, 8, 8), (256, 8, 32)]:
        chosen = torch.rand(100_000, experts, generator=torch.Generator().manual_seed(0)).topk(top_k).indices
        groups = torch.arange(experts) // (experts // devices)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            result = replay(chosen, groups, devices, "round-robin", nodes=max(1, devices // 8))
            times.append(time.perf_counter() - started)
        rows.append(
            {
                "experts": experts,
                "top_k": top_k,
                "devices": devices,
                "rows_per_token": result.rows_per_token,
                "million_tokens_per_second": 0.1 / float(np.median(times)),
            }
        )
    return rows


def permutation_speed(repeats: int = 5) -> list[dict[str, Any]]:
    """A random bf16 Qwen2-MoE of 12 layers with 32 experts of the demo model's width, and a small vocabulary."""
    sizes = {"hidden_size": 576, "moe_intermediate_size": 192, "shared_expert_intermediate_size": 1536}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_experts": 32, "num_experts_per_tok": 4}
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=1024, num_hidden_layers=12, **sizes, **heads)).bfloat16()
    counts = {layer: planted(32, 4, 20, 5, layer)[0] for layer in range(12)}
    placement = place(counts, 4, solver="swap", bound=False)
    copied, written = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(model, folder / "plain", record=Record(command="benchmark"))
        nbytes = sum(f.stat().st_size for f in (folder / "plain").iterdir())
        for number in range(repeats):
            started = time.perf_counter()
            shutil.copytree(folder / "plain", folder / f"copy-{number}")
            os.sync()
            copied.append(time.perf_counter() - started)
            started = time.perf_counter()
            place_checkpoint(folder / "plain", placement, folder / f"placed-{number}")
            written.append(time.perf_counter() - started)
            shutil.rmtree(folder / f"copy-{number}")
            shutil.rmtree(folder / f"placed-{number}")
    ratio = float(np.median(np.array(written) / np.array(copied)))
    row = {"megabytes": nbytes / 1e6, "copy_seconds": float(np.median(copied))}
    return [{**row, "permute_seconds": float(np.median(written)), "ratio": ratio}]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    found = load_file(arguments.counts)
    matrices = {"base": found["base"]}
    matrices |= {
        n: t for n, t in found.items() if t.shape == found["base"].shape and n not in {"base", "partner_lists"}
    }
    trace = Trace.load(arguments.trace) if arguments.trace else random_trace(20_000, 32, 4, 2)
    return {
        "solvers": [row for devices in (2, 4) for row in solver_rows(matrices["base"], devices)],
        "matrices": [row for devices in (2, 4) for row in matrix_rows(matrices, devices)],
        "planted": planted_rows(arguments.seeds),
        "opponents": opponent_rows(arguments.seeds),
        "trace": compare_solvers(trace).as_dicts(),
        "trace_of": trace.meta.model,
        "replay": replay_speed(),
        "permutation": permutation_speed(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, default=COUNTS, help="safetensors with `base` [L, E, E]")
    parser.add_argument("--trace", type=Path, help="trace folder to replay")
    parser.add_argument("--seeds", type=int, default=3, help="planted partitions of each strength")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    arguments = parser.parse_args()
    results = run(arguments)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    titles = {
        "solvers": "LLaMA-MoE-3.5B, 32 layers: solvers",
        "matrices": "LLaMA-MoE-3.5B: f by matrix (mean over layers)",
        "planted": "128 experts on 8 devices, planted partition",
        "opponents": "swap search and graph partitioners on planted partitions",
        "trace": f"rows by replay: {results['trace_of']}",
        "replay": "replay of 100,000 tokens, one layer",
        "permutation": "permuted checkpoint against a plain copy of the folder",
    }
    for key, title in titles.items():
        print(title)
        head = list(results[key][0])
        print_table(head, [[row[h] for h in head] for row in results[key]])


if __name__ == "__main__":
    main()
