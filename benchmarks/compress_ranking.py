"""What does each way of making a MoE smaller cost at the same bytes? On a small MoE trained from scratch.

    python benchmarks/compress_ranking.py [--model FOLDER] [--data six-domains] [--shares 0.75,0.5,0.35,0.25]
                                          [--heal-steps 0] [--out runs/compress-ranking]

Without --model the MoE of benchmarks/merge_ranking.py is trained first (some ten minutes on two cores). Every way is
run as a user runs it, decides on the same text, and is measured on the same unseen text beside the model as it was.
Bytes are those of the routed experts, a share of what they are in 16 bits: dropping, merging and narrowing leave that
share of their weights; rounding takes the most bits that fit, scales counted. --heal-steps also distils each result
from the model as it was, and measures it again. Prints each share's ranking, and which published order holds here.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from merge_ranking import lab

import moekit
from moekit.checkpoint import Checkpoint
from moekit.compress.budget.bits import packed_bits
from moekit.report.results import load_evaluation

GROUP = 16
STORED_BITS = 16


class Row(NamedTuple):
    """One way at one share.

    Attributes:
        name: of the way.
        share: of the experts' bytes that was asked for.
        left: share that is left of them.
        nll: loss on unseen text, nats a token.
        low, high: interval of its rise above the model as it was, by documents.
        healed: loss after healing; None without.
    """

    name: str
    share: float
    left: float
    nll: float
    low: float
    high: float
    healed: float | None = None


def bits_that_fit(share: float) -> int:
    """The most whole bits whose packed form, with scales and zero points, takes that share of 16 bits."""
    fitting = [n for n in range(1, 9) if packed_bits(GROUP, n, GROUP) / GROUP <= share * STORED_BITS]
    if not fitting:
        raise SystemExit(f"no width fits {share:.0%} of {STORED_BITS} bits in groups of {GROUP}")
    return max(fitting)


def _dropped(method: str, **settings: Any) -> Callable[[float], tuple[Any, dict[str, Any]]]:
    return lambda share: (moekit.prune, {"method": method, "keep": share, "settings": settings})


def _merged(method: str, **settings: Any) -> Callable[[float], tuple[Any, dict[str, Any]]]:
    return lambda share: (moekit.merge, {"method": method, "keep": share, "settings": settings})


def _rounded(method: str) -> Callable[[float], tuple[Any, dict[str, Any]]]:
    return lambda share: (
        moekit.quantize,
        {"method": method, "bits": bits_that_fit(share), "settings": {"group": GROUP}},
    )


def _narrowed(method: str, **settings: Any) -> Callable[[float], tuple[Any, dict[str, Any]]]:
    return lambda share: (moekit.slim, {"method": method, "width": share, "settings": {"multiple": 4, **settings}})


WAYS: Mapping[str, Callable[[float], tuple[Any, dict[str, Any]]]] = {
    "drop: random": _dropped("random"),
    "drop: frequency": _dropped("frequency"),
    "drop: reap": _dropped("reap"),
    "drop: mone": _dropped("mone"),
    "drop: mone, no novices": _dropped("mone", operator="drop"),
    "merge: random groups": _merged("random-groups"),
    "merge: m-smoe": _merged("m-smoe"),
    "merge: hc-smoe": _merged("hc-smoe"),
    "merge: ream": _merged("ream"),
    "narrow: magnitude": _narrowed("magnitude", repair="none"),
    "narrow: slimmoe": _narrowed("slimmoe"),
    "narrow: slimmoe, not repaired": _narrowed("slimmoe", repair="none"),
    "round: rtn": _rounded("rtn"),
    "round: gptq": _rounded("gptq"),
}
# (lower, than, shares at which it is published).
CLAIMS = (
    ("merge: ream", "drop: reap", (0.75,)),
    ("drop: reap", "merge: hc-smoe", (0.75,)),
    ("merge: hc-smoe", "merge: m-smoe", (0.75,)),
    ("merge: m-smoe", "merge: random groups", (0.75, 0.5)),
    ("drop: reap", "drop: random", (0.75, 0.5, 0.35, 0.25)),
    ("narrow: slimmoe", "narrow: slimmoe, not repaired", (0.75, 0.5, 0.35, 0.25)),
    ("narrow: slimmoe, not repaired", "narrow: magnitude", (0.75, 0.5)),
    ("narrow: slimmoe", "drop: reap", (0.5, 0.35, 0.25)),
    ("drop: mone", "drop: reap", (0.75, 0.5)),
    ("drop: mone", "drop: mone, no novices", (0.75, 0.5)),
    ("round: gptq", "round: rtn", (0.35, 0.25)),
)


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="six-domains")
    parser.add_argument("--shares", default="0.75,0.5,0.35,0.25")
    parser.add_argument("--tokens", type=int, default=16_384, help="decided on")
    parser.add_argument("--heldout-tokens", type=int, default=32_768)
    parser.add_argument("--heal-steps", type=int, default=0)
    parser.add_argument("--only", default="", help="ways, separated by commas; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/compress-ranking"))
    return parser.parse_args()


def measured(folder: Path, options: argparse.Namespace, name: str) -> Path:
    """Evaluation of a model on the unseen text, paired with the model as it was; kept."""
    kept = options.out / "evaluations" / name
    if not kept.exists():
        moekit.evaluate(
            folder,
            name=name,
            data=options.data,
            split="heldout",
            max_tokens=options.heldout_tokens,
            window=256,
            baseline=None if name == "unchanged" else options.out / "evaluations" / "unchanged",
            out=kept,
            progress=False,
        )
    return kept


def loss_of(evaluation: Path) -> float:
    """Nats a token over all documents."""
    perplexity = load_evaluation(evaluation).perplexity
    assert perplexity is not None
    return sum(perplexity.nll) / sum(perplexity.tokens)


def rise_of(evaluation: Path) -> tuple[float, float]:
    """Interval of the rise above the model as it was."""
    told = json.loads((evaluation / "comparison.json").read_text(encoding="utf-8"))
    difference = told["overall"]["difference"]
    return difference["low"], difference["high"]


def expert_bytes(folder: Path) -> int:
    """Of the routed experts as they are stored."""
    return sum(tensor.nbytes for name, tensor in Checkpoint.open(folder).tensors.items() if ".experts." in name)


def row(name: str, share: float, source: Path, options: argparse.Namespace, text: Any) -> Row:
    """Carry one way out at one share, and measure it."""
    label = f"{name.replace(': ', '-').replace(' ', '-')}-{share:g}"
    out = options.out / "models" / label
    function, arguments = WAYS[name](share)
    if not out.exists():
        function(source, data=text, out=out, proof=False, progress=False, seed=0, **arguments)
    evaluation = measured(out, options, label)
    left = expert_bytes(out) / expert_bytes(source)
    if "bits" in arguments:
        left *= packed_bits(GROUP, arguments["bits"], GROUP) / GROUP / STORED_BITS
    return Row(name, share, left, loss_of(evaluation), *rise_of(evaluation), healed=healed(out, source, options, label))


def healed(out: Path, source: Path, options: argparse.Namespace, label: str) -> float | None:
    """Loss after distilling from the model as it was; None where that was not asked for."""
    if not options.heal_steps:
        return None
    folder = options.out / "healed" / label
    if not folder.exists():
        moekit.heal(
            out,
            teacher=source,
            data=options.data,
            settings={"steps": options.heal_steps},
            proof=False,
            out=folder,
            progress=False,
        )
    return loss_of(measured(folder, options, f"{label}-healed"))


def main() -> None:
    """Train, make smaller, measure, print."""
    options = parsed()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    source, start = lab(options), time.perf_counter()
    unchanged = loss_of(measured(source, options, "unchanged"))
    text = options.data
    wanted = [name for name in WAYS if not options.only or name in options.only.split(",")]
    found: dict[tuple[float, str], Row] = {}
    for share in map(float, options.shares.split(",")):
        rows = sorted((row(name, share, source, options, text) for name in wanted), key=lambda row: row.nll)
        print(f"\n{share:.0%} of the experts' bytes; unchanged {unchanged:.3f}")
        for place, told in enumerate(rows, 1):
            after = "" if told.healed is None else f", healed {told.healed:.3f}"
            print(
                f"{place:>3} {told.name:<24} {told.nll:.3f} {told.nll - unchanged:+.3f} "
                f"[{told.low:+.3f}, {told.high:+.3f}], bytes {told.left:.1%}{after}"
            )
            found[share, told.name] = told
    print("\nclaim (lower loss)")
    for name, than, shares in CLAIMS:
        for share in shares:
            if (share, name) in found and (share, than) in found:
                gap = found[share, name].nll - found[share, than].nll
                print(f"  {'holds' if gap < 0 else 'does NOT hold':<14} {name} < {than}, {share:.0%}: {gap:+.4f} nats")
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
