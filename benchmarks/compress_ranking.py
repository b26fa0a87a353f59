"""What does each way of making a MoE smaller cost at the same bytes, and does the planner beat them all?

    python benchmarks/compress_ranking.py                                  # trains a small MoE first, some ten minutes
    python benchmarks/compress_ranking.py --model runs/prune-demo/moe --data demo --tokens 8192 --heldout-tokens 8192
    python benchmarks/compress_ranking.py --shares 0.5 --heal-steps 300    # and again after distillation

Every way is run as a user runs it, decides on the same text, and is measured on the same unseen text beside the model
as it was, whose weights are stored in 16 bits. Bytes are those of the routed experts, as a share of what they are:
dropping, merging and narrowing leave that share of their weights; rounding takes the most bits that fit, scales
counted; `fit` gets the bytes of the whole file. --heal-steps also distils each result from the model as it was and
measures it again. Prints each share's ranking, which published order holds here, and the planner against the best
single way; writes the chart of loss over bytes to report.html in --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from merge_ranking import lab
from transformers import AutoModelForCausalLM

import moekit
from moekit.checkpoint import Checkpoint
from moekit.compress.budget.bits import packed_bits
from moekit.report import build
from moekit.report.data import Finding, LinesSection, ReportData
from moekit.report.parts import Axis, LineChart, Point, Series
from moekit.report.results import load_evaluation
from moekit.report.run_info import describe_run

STORED_BITS = 16
GROUPS = (64, 32, 16)
# Healing: routers where experts went, experts where they became narrow; rounded weights stay rounded.
HEAL = {"drop": "router", "merge": "router", "narrow": "experts", "round": "router", "fit": "router"}


@dataclass(frozen=True)
class Row:
    """One way at one share.

    Attributes:
        name: of the way.
        share: of the experts' bytes that was asked for.
        left: share that is left of them.
        nll: loss on unseen text, nats a token.
        low, high: interval of its rise above the model as it was, by documents.
        healed: loss after healing; None without.
        told: what else a planner said.
    """

    name: str
    share: float
    left: float
    nll: float
    low: float
    high: float
    healed: float | None = None
    told: str = ""

    @property
    def kind(self) -> str:
        """What is done, without the method."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Case:
    """A model at a share.

    Attributes:
        source: the model.
        share: of its experts' bytes.
        group: weights that share a scale.
        options: of the run.
    """

    source: Path
    share: float
    group: int
    options: argparse.Namespace

    @property
    def bits(self) -> int:
        """The most whole bits whose packed form, with scales and zero points, takes that share of 16 bits."""
        fitting = [n for n in range(1, 9) if self.packed(n) <= self.share * STORED_BITS]
        if not fitting:
            raise SystemExit(f"no width fits {self.share:.0%} of {STORED_BITS} bits in groups of {self.group}")
        return max(fitting)

    def packed(self, bits: int) -> float:
        """Bits of a weight, scales and zero points with it."""
        return float(packed_bits(self.group, bits, self.group) / self.group)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file at that share of its experts."""
        checkpoint = Checkpoint.open(self.source)
        files = sum((checkpoint.path / shard).stat().st_size for shard in checkpoint.shards)
        return files - int((1 - self.share) * expert_bytes(self.source))


Way = Callable[[Case], tuple[Any, dict[str, Any]]]


def _dropped(method: str, repair: str = "none", **settings: Any) -> Way:
    told = {"method": method, "repair": repair, "settings": settings}
    return lambda case: (moekit.prune, {"keep": case.share, **told})


def _merged(method: str, repair: str = "none", **settings: Any) -> Way:
    told = {"method": method, "repair": repair, "settings": settings}
    return lambda case: (moekit.merge, {"keep": case.share, **told})


def _narrowed(method: str, **settings: Any) -> Way:
    return lambda case: (moekit.slim, {"method": method, "width": case.share, "settings": {"multiple": 8, **settings}})


def _rounded(method: str) -> Way:
    return lambda case: (moekit.quantize, {"method": method, "bits": case.bits, "settings": {"group": case.group}})


def _shared(share: str) -> Way:
    def way(case: Case) -> tuple[Any, dict[str, Any]]:
        near = [n for n in (case.bits - 1, case.bits, case.bits + 1) if 1 <= n <= 8]
        told = {"mean_bits": case.bits, "choices": near, "share": share, "settings": {"group": case.group}}
        return moekit.quantize, {"method": "rtn", **told}

    return way


def _fitted(engine: str) -> Way:
    def way(case: Case) -> tuple[Any, dict[str, Any]]:
        told = {"bytes": case.nbytes, "engine": engine, "costs": str(case.options.out / f"costs-{engine}.json")}
        return moekit.fit, {**told, "random_plans": case.options.random_plans, "proof_tokens": case.options.tokens}

    return way


WAYS: Mapping[str, Way] = {
    "drop: random": _dropped("random"),
    "drop: frequency": _dropped("frequency"),
    "drop: reap": _dropped("reap"),
    "drop: reap, repaired": _dropped("reap", repair="least-squares"),
    "drop: mone": _dropped("mone"),
    "drop: mone, no novices": _dropped("mone", operator="drop"),
    "merge: random groups": _merged("random-groups"),
    "merge: m-smoe": _merged("m-smoe"),
    "merge: sub-moe": _merged("sub-moe"),
    "merge: hc-smoe": _merged("hc-smoe"),
    "merge: hc-smoe, repaired": _merged("hc-smoe", repair="least-squares"),
    "merge: ream": _merged("ream"),
    "narrow: magnitude": _narrowed("magnitude", repair="none"),
    "narrow: slimmoe": _narrowed("slimmoe"),
    "narrow: slimmoe, output-norm": _narrowed("slimmoe", score="output-norm"),
    "narrow: slimmoe, not repaired": _narrowed("slimmoe", repair="none"),
    "round: rtn": _rounded("rtn"),
    "round: gptq": _rounded("gptq"),
    "round: random bits": _shared("random"),
    "round: pmq": _shared("pmq"),
    "round: gemq": _shared("gemq"),
    "fit: plain weights": _fitted("stock"),
    "fit: bits, too": _fitted("moekit"),
}
ALL = (0.75, 0.5, 0.35, 0.25)
# (lower, than, shares at which it is published).
CLAIMS = (
    ("merge: ream", "drop: reap", (0.75,)),
    ("drop: reap", "merge: hc-smoe", (0.75, 0.5)),
    ("merge: hc-smoe", "merge: m-smoe", (0.75, 0.5)),
    ("merge: sub-moe", "merge: hc-smoe", (0.75, 0.5)),
    ("merge: m-smoe", "merge: random groups", ALL),
    ("drop: reap", "drop: random", ALL),
    ("drop: reap, repaired", "drop: reap", ALL),
    ("drop: mone", "drop: reap", (0.75, 0.5)),
    ("drop: mone", "drop: mone, no novices", (0.75, 0.5)),
    ("narrow: slimmoe", "narrow: slimmoe, not repaired", ALL),
    ("narrow: slimmoe, not repaired", "narrow: magnitude", ALL),
    ("narrow: slimmoe", "drop: reap", (0.5, 0.35, 0.25)),
    ("round: gptq", "round: rtn", (0.35, 0.25)),
    ("round: gemq", "round: pmq", (0.35, 0.25)),
    ("round: pmq", "round: rtn", (0.35, 0.25)),
    ("round: rtn", "round: random bits", (0.35, 0.25)),
)


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="six-domains")
    parser.add_argument("--shares", default=",".join(map(str, ALL)))
    parser.add_argument("--tokens", type=int, default=16_384, help="decided on")
    parser.add_argument("--heldout-tokens", type=int, default=32_768)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--random-plans", type=int, default=12, help="that fit measures beside its own")
    parser.add_argument("--heal-steps", type=int, default=0)
    parser.add_argument("--heal-batch", type=int, default=8)
    parser.add_argument("--only", default="", help="ways, separated by ; (all by default)")
    parser.add_argument("--out", type=Path, default=Path("runs/compress-ranking"))
    return parser.parse_args()


def in_sixteen_bits(source: Path, out: Path) -> Path:
    """The model stored in bfloat16, as models are published; itself where it is."""
    if all(info.dtype in ("BF16", "F16") for info in Checkpoint.open(source).tensors.values()):
        return source
    folder = out / "source"
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        part = out / "source.part"
        model.save_pretrained(part)
        for file in source.glob("*token*"):
            shutil.copy(file, part)
        part.rename(folder)
    return folder


def group_of(source: Path) -> int:
    """The largest group that divides all inputs of the experts' matrices."""
    shapes = [info.shape for name, info in Checkpoint.open(source).tensors.items() if ".experts." in name]
    return next(group for group in GROUPS if all(shape[-1] % group == 0 for shape in shapes))


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


def row(name: str, case: Case) -> Row:
    """Carry one way out at one share, and measure it; what an earlier run has measured is read."""
    options, source = case.options, case.source
    label = f"{name.replace(': ', '-').replace(', ', '-').replace(' ', '-')}-{case.share:g}"
    kept = options.out / "rows" / f"{label}.json"
    if kept.exists():
        found = Row(**json.loads(kept.read_text(encoding="utf-8")))
        return found if found.healed is not None or not options.heal_steps else _and_healed(found, case, label)
    out = options.out / "models" / label
    function, arguments = WAYS[name](case)
    common = {"data": options.data, "max_tokens": options.tokens, "seq_len": options.seq_len, "progress": False}
    if function is not moekit.fit:
        common["proof"] = False
    made = function(source, out=out, overwrite=True, seed=0, **common, **arguments)
    left, told = expert_bytes(out) / expert_bytes(source), ""
    if function is moekit.quantize:
        left *= case.packed(case.bits) / STORED_BITS
    elif function is moekit.fit:
        left = 1 - (made.bytes["before"] - made.bytes["after"]) / expert_bytes(source)
        told = f"{made.layers[0]['recipe']}, ...; rank correlation {made.correlation or 0:.2f}, {len(made.tried)} plans"
    evaluation = measured(out, options, label)
    found = Row(name, case.share, left, loss_of(evaluation), *rise_of(evaluation), told=told)
    _keep(kept, found)
    return _and_healed(found, case, label) if options.heal_steps else found


def _keep(file: Path, found: Row) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(found)), encoding="utf-8")


def _and_healed(found: Row, case: Case, label: str) -> Row:
    """The same with its loss after distilling from the model as it was."""
    options, folder = case.options, case.options.out / "healed" / label
    if not folder.exists():
        moekit.heal(
            options.out / "models" / label,
            teacher=case.source,
            data=options.data,
            what=HEAL[found.kind],
            settings={"steps": options.heal_steps, "seq_len": options.seq_len, "batch": options.heal_batch},
            proof=False,
            out=folder,
            progress=False,
        )
    after = Row(**{**asdict(found), "healed": loss_of(measured(folder, options, f"{label}-healed"))})
    _keep(options.out / "rows" / f"{label}.json", after)
    return after


def printed(rows: Iterable[Row], unchanged: float) -> None:
    """One share's ranking."""
    for place, told in enumerate(sorted(rows, key=lambda found: found.nll), 1):
        after = "" if told.healed is None else f", healed {told.healed - unchanged:+.3f}"
        print(
            f"{place:>3} {told.name:<30} {told.nll:.3f} {told.nll - unchanged:+.3f} "
            f"[{told.low:+.3f}, {told.high:+.3f}], bytes {told.left:.1%}{after}"
            + (f"  ({told.told})" if told.told else ""),
            flush=True,
        )


def judged(found: Mapping[tuple[float, str], Row], shares: Iterable[float]) -> None:
    """Which published order holds here, and whether the planner beats the best single way."""
    print("\nclaim (lower loss)")
    for name, than, where in CLAIMS:
        for share in where:
            if (share, name) in found and (share, than) in found:
                gap = found[share, name].nll - found[share, than].nll
                print(f"  {'holds' if gap < 0 else 'does NOT hold':<14} {name} < {than}, {share:.0%}: {gap:+.4f} nats")
    print("\nthe planner against the best single way of what it may choose from")
    # What routes by parts of its own is no folder of plain weights.
    singles = [told for told in found.values() if told.kind != "fit" and told.name != "drop: mone"]
    plain = [told for told in singles if told.kind != "round"]
    for share in shares:
        for planner, among in (("fit: plain weights", plain), ("fit: bits, too", singles)):
            # Widths go in whole steps: what took more bytes than were asked for is no rival.
            others = [told for told in among if told.share == share and told.left <= share + 0.01]
            if (share, planner) in found and others:
                best = min(others, key=lambda told: told.nll)
                gap = found[share, planner].nll - best.nll
                word = "beats" if gap <= 0 else "LOSES to"
                print(f"  {planner} {word} {best.name}, {share:.0%}: {gap:+.4f} nats")


def drawn(rows: Iterable[Row], unchanged: float, options: argparse.Namespace) -> Path:
    """The page: loss over bytes, the best way of each kind, and the planner."""
    best: dict[tuple[str, float], Row] = {}
    for told in rows:
        key = told.name if told.kind == "fit" else told.kind, told.share
        best[key] = min(best.get(key, told), told, key=lambda found: found.nll)
    names = sorted({name for name, _ in best}, key=lambda name: (not name.startswith("fit"), name))
    series = tuple(
        Series(
            name=name,
            points=tuple(
                Point(x=r.left, y=r.nll - unchanged, y_low=r.low, y_high=r.high)
                for (own, _), r in sorted(best.items(), key=lambda item: item[1].left)
                if own == name
            ),
        )
        for name in names
    )
    title = "Loss over bytes, the best way of each kind and the planner"
    axes = Axis(label="bytes of the routed experts", unit="%"), Axis(label="rise of the loss, nats a token", zero=True)
    chart = LineChart(title=title, x=axes[0], y=axes[1], series=series)
    data = ReportData(
        title="Making a MoE smaller",
        headline=Finding(text=f"Unchanged, the model has a loss of {unchanged:.3f} nats a token on this text."),
        sections=(LinesSection(title=title, charts=(chart,)),),
        run=describe_run(commands=("python benchmarks/compress_ranking.py",), seed=0),
    )
    return build(data, options.out / "report.html")


def main() -> None:
    """Train, make smaller, measure, print, draw."""
    options = parsed()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    source, start = in_sixteen_bits(lab(options), options.out), time.perf_counter()
    unchanged = loss_of(measured(source, options, "unchanged"))
    wanted = [name for name in WAYS if not options.only or name in options.only.split(";")]
    found: dict[tuple[float, str], Row] = {}
    shares = [float(share) for share in options.shares.split(",")]
    for share in shares:
        case = Case(source, share, group_of(source), options)
        print(f"\n{share:.0%} of the experts' bytes; unchanged {unchanged:.3f}", flush=True)
        found |= {(share, name): row(name, case) for name in wanted}
        printed((told for (own, _), told in found.items() if own == share), unchanged)
    judged(found, shares)
    print(f"\n{drawn(found.values(), unchanged, options)}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
