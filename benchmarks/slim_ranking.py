"""Which neurons should narrow experts keep, and what is the repair worth? On a small MoE trained from scratch.

    python benchmarks/slim_ranking.py [--data six-domains] [--model FOLDER] [--out runs/slim-ranking]

Without --model a MoE of 4 layers with 8 experts of 96 neurons, top-2, is trained first on --data (some minutes on two
cores), and kept in --out. Then experts keep a half, a quarter and an eighth of their neurons by each score, repaired
and not, all decided on one recording and measured on unseen text side by side, next to dropping half of the experts by
REAP (as many weights as half of the neurons), those that stay as they are and refitted. Prints losses, and for each
claim whether it holds here.

Papers: SlimMoE arXiv:2506.18349, REAP 2510.13999.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import moekit
from moekit.bench.pruning import take_tokens
from moekit.checkpoint import Checkpoint
from moekit.compress.budget.sizes import Budget
from moekit.compress.budget.width import WidthBudget, width_for
from moekit.compress.engine.making import make_layers
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.plan import WeightPlan, make_method
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.repairing import BlockRepair
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.rewriting import rewriter
from moekit.data import load_text
from moekit.data.batches import arrange
from moekit.evaluation.changes import Variant
from moekit.evaluation.variants import VariantResult, compare_variants
from moekit.jobs.shared.inputs import load_tokenizer
from moekit.trace import Trace, record

LAB: dict[str, Any] = {
    "vocabulary": 2048,
    "hidden": 128,
    "layers": 4,
    "experts": 8,
    "top_k": 2,
    "width": 96,
    "training": {
        **{"tokens": 500_000, "lr": 3e-3, "warmup": 0.02, "weight_decay": 0.1, "beta2": 0.98, "seq_len": 256},
        **{"batch": 16, "objectives": {"balance": 0.01, "z": 0.001}, "save_every": 100},
    },
}
WIDTHS = ("1/2", "1/4", "1/8")
REPAIRS = ("none", "least-squares")
# Label -> method and knobs.
SLIM: Mapping[str, tuple[str, dict[str, Any]]] = {
    "taylor": ("slimmoe", {}),
    "fisher": ("slimmoe", {"score": "fisher"}),
    "output-norm": ("slimmoe", {"score": "output-norm"}),
    "magnitude": ("magnitude", {}),
    "random": ("random", {}),
}
REAP = "reap, half of the experts"
REFITTED = f"{REAP}, refitted"
# What is said to be lower: (name, than), at each width.
CLAIMS = (
    ("taylor, none", "magnitude, none"),
    ("magnitude, none", "random, none"),
    ("taylor, none", "output-norm, none"),
    *((f"{score}, least-squares", f"{score}, none") for score in SLIM),
    ("taylor, least-squares", "magnitude, least-squares"),
    ("taylor, least-squares", "random, least-squares"),
    ("random, least-squares", "taylor, none"),
)


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="six-domains")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/slim-ranking"))
    parser.add_argument("--tokens", type=int, default=32_768, help="decided on")
    parser.add_argument("--heldout-tokens", type=int, default=32_768)
    return parser.parse_args()


def lab(options: argparse.Namespace) -> Path:
    """The model, trained if it is not there."""
    folder: Path = options.model or options.out / "moe"
    if not folder.exists():
        made = moekit.pretrain_tiny(options.data, settings=LAB, out=folder)
        print(f"trained on {made.tokens:,} tokens: {made.figures}", flush=True)
    return folder


def calibration(folder: Path, options: argparse.Namespace) -> CalibrationText:
    """The text that is decided on, and that weights are made on."""
    text = take_tokens(load_text(options.data, split="train"), load_tokenizer(str(folder)), options.tokens)
    return CalibrationText(list(arrange(text, 256).batches(8)), dtype=torch.float32, device="cpu")


def recorded(folder: Path, checkpoint: Checkpoint, text: CalibrationText) -> Trace:
    """All that any of the methods decides from."""
    needs = {"load", *make_method("prune", "reap", {}).required}
    for method, knobs in SLIM.values():
        needs |= {*make_method("slim", method, knobs).required}
    model = moekit.load(folder, device="cpu", dtype="float32")
    return record(model, text.batches, statistics=sorted(needs), keep_choices=False, fingerprint=checkpoint.fingerprint)


def variants(checkpoint: Checkpoint, trace: Trace, text: CalibrationText, share: str) -> list[Variant]:
    """Experts narrowed to a share of their neurons, in all ways."""
    before = next(iter(geometries_of(checkpoint).values())).width
    budget = WidthBudget(width=width_for(share, before, 1))
    labels, plans = list[str](), list[WeightPlan]()
    for label, (name, knobs) in SLIM.items():
        for repair in REPAIRS:
            method = make_method("slim", name, {**knobs, "repair": repair})
            plans.append(plan_weights(checkpoint, trace if method.required else None, PlanRequest(method, budget)))
            labels.append(f"{label}, {repair}")
    made = zip(labels, make_layers(checkpoint, text, plans), strict=True)
    return [Variant(label, plan.outcomes, rewriter(plan, checkpoint)) for label, plan in made]


def dropped(checkpoint: Checkpoint, trace: Trace, text: CalibrationText) -> list[Variant]:
    """Half of the experts, whole; those that stay as they are, and refitted to what their layer gave."""
    made = []
    for label, repair in ((REAP, None), (REFITTED, BlockRepair())):
        request = PlanRequest(make_method("prune", "reap", {}), Budget(keep=0.5), repair=repair)
        (plan,) = make_layers(checkpoint, text, [plan_weights(checkpoint, trace, request)])
        made.append(Variant(label, plan.outcomes, rewriter(plan, checkpoint)))
    return made


def nats(result: VariantResult) -> float:
    """Loss a token."""
    return math.log(result.perplexity.overall.perplexity)


def show(results: list[VariantResult], unchanged: float) -> dict[str, float]:
    """Print them, best first; name -> loss in nats a token."""
    for place, result in enumerate(sorted(results, key=nats), 1):
        error = sum(result.reconstruction.values()) / len(result.reconstruction)
        print(f"{place:>3} {result.name:<28} {nats(result):.4f} {nats(result) - unchanged:+.4f}, output {error:.1%}")
    return {result.name: nats(result) for result in results}


def judged(losses: Mapping[str, float], claims: tuple[tuple[str, str], ...]) -> None:
    """Print each claim, and whether it holds here."""
    for name, than in claims:
        gap = losses[name] - losses[than]
        print(f"  {'holds' if gap < 0 else 'does NOT hold':<14} {name} < {than}: {gap:+.4f} nats")


def main() -> None:
    """Train, measure, print."""
    options = parsed()
    print(f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    folder = lab(options)
    checkpoint = Checkpoint.open(folder)
    text = calibration(folder, options)
    trace = recorded(folder, checkpoint, text)
    heldout = take_tokens(load_text(options.data, split="heldout"), load_tokenizer(str(folder)), options.heldout_tokens)
    for share in WIDTHS:
        extra = dropped(checkpoint, trace, text) if share == "1/2" else []
        asked = [*variants(checkpoint, trace, text, share), *extra]
        plain, results = compare_variants(checkpoint, heldout, asked, window=256, dtype=torch.float32, device="cpu")
        unchanged = math.log(plain.overall.perplexity)
        print(f"\n{share} of the neurons; unchanged {unchanged:.4f} nats ({plain.overall.documents} documents)")
        losses = show(results, unchanged)
        judged(losses, CLAIMS + ((("taylor, least-squares", REAP), (REFITTED, REAP)) if extra else ()))


if __name__ == "__main__":
    main()
