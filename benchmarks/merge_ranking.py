"""Does merging rank as its papers say, and how does it stand beside pruning? On a small MoE trained from scratch.

    python benchmarks/merge_ranking.py [--data six-domains] [--model FOLDER] [--out runs/merge-ranking]

Without --model a MoE of 4 layers with 16 experts, top-4, is trained first on --data (some ten minutes on two cores),
and kept in --out. Then every merging method, with its main settings, and the strongest of the pruning ones keep 75 %
and 50 % of the experts, decided on the same text, measured on unseen text; random choices with --seeds seeds. Prints
both rankings, and for each paper's claim whether it holds here, with the difference.

Papers: M-SMoE arXiv:2310.01334, HC-SMoE 2410.08589, Sub-MoE 2506.23266, REAM 2604.04356, REAP 2510.13999.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import moekit
from moekit.bench.pruning import (
    Entry,
    PruneBenchResult,
    PruneBenchSetting,
    Subject,
    bench_pruning,
    default_entries,
    take_tokens,
)
from moekit.checkpoint import Checkpoint
from moekit.data import load_text
from moekit.jobs.shared.inputs import load_tokenizer

LAB: dict[str, Any] = {
    "vocabulary": 4096,
    "hidden": 128,
    "layers": 4,
    "experts": 16,
    "top_k": 4,
    "width": 48,
    "training": {
        **{"tokens": 1_500_000, "lr": 3e-3, "warmup": 0.02, "weight_decay": 0.1, "beta2": 0.98, "seq_len": 256},
        **{"batch": 16, "objectives": {"balance": 0.01, "z": 0.001}, "save_every": 100},
    },
}
PRUNE = ("reap", "uncurl")
# Label -> method and knobs.
MERGE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "random groups": ("random-groups", {}),
    "m-smoe": ("m-smoe", {}),
    "m-smoe, not aligned": ("m-smoe", {"align": "none"}),
    "m-smoe, plain mean": ("m-smoe", {"weigh": "equal"}),
    "hc-smoe": ("hc-smoe", {}),
    "hc-smoe, rms": ("hc-smoe", {"feature": "rms"}),
    "sub-moe": ("sub-moe", {}),
    "ream": ("ream", {"mode": "layerwise"}),
    "ream, not aligned": ("ream", {"mode": "layerwise", "align": "none"}),
}
# What a paper, or its card, says is lower: (name, than, budgets at which it is said).
CLAIMS = (
    ("m-smoe", "random groups", (0.75, 0.5)),
    ("m-smoe", "m-smoe, plain mean", (0.75, 0.5)),
    ("m-smoe", "m-smoe, not aligned", (0.75, 0.5)),
    ("hc-smoe", "m-smoe", (0.75, 0.5)),
    ("sub-moe", "hc-smoe", (0.75, 0.5)),
    ("ream", "ream, not aligned", (0.75, 0.5)),
    ("ream", "hc-smoe", (0.75,)),
    ("ream", "reap", (0.75,)),
    ("reap", "hc-smoe", (0.75, 0.5)),
)


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="six-domains")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/merge-ranking"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_384, help="decided on")
    parser.add_argument("--heldout-tokens", type=int, default=32_768)
    return parser.parse_args()


def lab(options: argparse.Namespace) -> Path:
    """The model, trained if it is not there."""
    folder = options.model or options.out / "moe"
    if not folder.exists():
        start = time.perf_counter()
        made = moekit.pretrain_tiny(options.data, settings=LAB, out=folder)
        print(f"trained in {time.perf_counter() - start:.0f} s: {made}", flush=True)
    return folder


def measured(folder: Path, options: argparse.Namespace) -> PruneBenchResult:
    """All methods at both budgets."""
    tokenizer = load_tokenizer(str(folder))
    subject = Subject(Checkpoint.open(folder), torch.float32, "cpu", tokenizer, options.data)
    entries = [*default_entries(PRUNE), *(Entry(method=m, settings=s, label=n) for n, (m, s) in MERGE.items())]
    setting = PruneBenchSetting(
        entries=tuple(entries), keep=(0.75, 0.5), seeds=options.seeds, seq_len=256, window=256, search_tokens=2048
    )
    text = take_tokens(load_text(options.data, split="train"), tokenizer, options.tokens)
    heldout = take_tokens(load_text(options.data, split="heldout"), tokenizer, options.heldout_tokens)
    return bench_pruning(subject, text, heldout, setting, options.out / "work")


def rankings(result: PruneBenchResult) -> dict[tuple[float, str], float]:
    """Print them, best first; (budget, name) -> loss in nats a token."""
    losses: dict[tuple[float, str], float] = {}
    for ranking in result.rankings:
        if ranking.text != "all":
            continue
        print(f"\nkeep {ranking.keep:.0%}; unchanged {ranking.unchanged:.3f} ({ranking.documents} documents)")
        for place, row in enumerate(ranking.rows, 1):
            rise = "" if row.rise is None else f" [{row.rise.low:+.3f}, {row.rise.high:+.3f}]"
            spread = "" if row.spread is None else f", spread over {row.seeds} seeds {row.spread:.3f}"
            gap = row.nll - ranking.unchanged
            print(f"{place:>3} {row.name:<24} {row.nll:.3f} {gap:+.3f}{rise}, output {row.reconstruction:.0%}{spread}")
            losses[float(ranking.keep), row.name] = row.nll
    for skipped in result.skipped:
        print(f"    {skipped.name} took no part: {skipped.reason}")
    return losses


def judged(losses: Mapping[tuple[float, str], float]) -> None:
    """Print each claim, and whether it holds here."""
    print("\nclaim (lower loss)")
    for name, than, budgets in CLAIMS:
        for keep in budgets:
            if (keep, name) in losses and (keep, than) in losses:
                gap = losses[keep, name] - losses[keep, than]
                print(
                    f"  {'holds' if gap < 0 else 'does NOT hold':<14} {name} < {than}, keep {keep:.0%}: {gap:+.4f} nats"
                )


def main() -> None:
    """Train, measure, print."""
    options = parsed()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    folder = lab(options)
    start = time.perf_counter()
    losses = rankings(measured(folder, options))
    judged(losses)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
