"""What one calibration pass for all pruning methods costs: its time over that of a plain forward of the same tokens.

    python benchmarks/calibration_cost.py [--repeats 8] [--rows 8] [--length 256] [--model FOLDER]

The statistics are the union of what all registered pruning methods need. Three ways are compared with a plain forward
by the faster of transformers' "eager" and "grouped_mm" experts: the recorder that runs routed experts once, the one
that runs them beside the model's own, and the pass that streams the checkpoint from disk layer by layer.
Passes alternate with plain ones; intervals are 95 % bootstrap intervals of the median ratio. The rows that experts'
down projections see are counted: a recorded pass must see each routed token once.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from trace_overhead import alternate, demo_sized_model, timed

import moekit
from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.checkpoint import Checkpoint
from moekit.trace import Recorder
from moekit.trace.streamed import record_streamed


def needs() -> list[str]:
    """What all pruning methods need, each with its default knobs."""
    found = {"load"}
    for record in catalogue.methods("prune"):
        if not record.cls.searches:
            found |= set(record.cls().required)
    return sorted(found)


def rows_seen(model: nn.Module, run: Callable[[], object]) -> int:
    """Rows that go through down projections of routed experts in a pass that runs them one by one."""
    weights = {p.data_ptr() for layer in find_moe_layers(model) for p in layer.experts.down_proj}
    rows, linear = [0], nn.functional.linear

    def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.data_ptr() in weights:
            rows[0] += x.shape[0]
        return linear(x, weight, bias)

    nn.functional.linear = counting
    try:
        run()
    finally:
        nn.functional.linear = linear
    return rows[0]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--model", default="")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.getLogger("moekit").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or scratch
        if not args.model:
            demo_sized_model().save_pretrained(scratch)
        result = measure(Path(folder), args.repeats, args.rows, args.length)
    print(json.dumps(result, indent=2) if args.json else readable(result))


def measure(folder: Path, repeats: int, rows: int, length: int) -> dict:
    model = moekit.load(folder, device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)

    def plain() -> None:
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

    speeds = {}
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        plain()
        speeds[name] = float(min(timed(plain, "cpu")[0] for _ in range(3)))
    fastest = min(speeds, key=speeds.__getitem__)
    model.set_experts_implementation(fastest)
    statistics, ways = needs(), {}
    for name, once in (("once", True), ("twice", False)):
        recorder = Recorder(model, statistics=statistics, keep_choices=False, once=once, fingerprint="")

        def recorded(recorder: Recorder = recorder) -> None:
            with recorder:
                plain()
                recorder.flush()

        ways[name] = alternate(plain, recorded, repeats, "cpu")
        if once:
            seen = rows_seen(model, recorded)
    checkpoint = Checkpoint.open(folder)
    _ = checkpoint.fingerprint
    batch = [{"input_ids": ids, "attention_mask": mask}]

    def streamed() -> None:
        record_streamed(checkpoint, batch, statistics=statistics)

    ways["streamed from disk, weights read anew"] = alternate(plain, streamed, max(3, repeats // 2), "cpu")
    routed = sum(layer.geometry.top_k for layer in find_moe_layers(model)) * ids.numel()
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "tokens": ids.numel(),
        "statistics": statistics,
        "plain": speeds,
        "experts": fastest,
        "rows seen": seen,
        "rows routed": routed,
        "recorded": ways,
    }


def readable(result: dict) -> str:
    lines = [
        f"{result['machine']}, {result['date']}; {result['tokens']} tokens",
        f"{len(result['statistics'])} statistics: {', '.join(result['statistics'])}",
        "plain forward: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in result["plain"].items()),
        f"rows through down projections: {result['rows seen']:,}, routed: {result['rows routed']:,}",
    ]
    for name, way in result["recorded"].items():
        wall, own = way["wall"], way["processor"]
        lines.append(
            f"{name}: {wall['ratio']:.3f} [{wall['low']:.3f}, {wall['high']:.3f}] of the plain forward's time "
            f"(processor {own['ratio']:.3f} [{own['low']:.3f}, {own['high']:.3f}])"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
