"""Whole experts first and single weights after, or single weights alone? At equal sparsity of the experts' weights.

    python benchmarks/stun_two_stages.py --model runs/pretrain-tiny/moe --data six-domains [--totals 0.4 0.5 0.65]

On a trained MoE: STUN (arXiv:2409.06211) and REAP (arXiv:2510.13999) keep some share of the experts, then Wanda zeroes
weights of what is left until the total is gone, each layer behind the sparse ones; beside it Wanda, OWL and magnitudes
on all experts. Everything is decided on one text and judged on unseen text. Prints the loss (mean over domains, nats a
token) of each mix, the zeros counted, the paired difference from the method alone with its 95 % interval, and whether
the trend holds: some mix beats the method alone by 0.03 nats at a half and by 0.1 at 65 %, and too many experts lose.
Some minutes on two cores for a model of 12 M parameters and 8,192 tokens of each text.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moekit import catalogue
from moekit.bench.pruning import take_tokens
from moekit.checkpoint import Checkpoint, Record
from moekit.compress.budget.parents import expert_weights, find_original
from moekit.compress.budget.sizes import Budget
from moekit.compress.budget.sparsity import SparsityBudget, remaining_sparsity
from moekit.compress.engine.apply import apply
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.rewriting import PlannedRewrite, rewriter
from moekit.compress.engine.zeroing import SparsifyMethod
from moekit.data import TokenizedDocument, load_text
from moekit.data.batches import arrange
from moekit.evaluation import Evaluation, compare
from moekit.evaluation.changes import Variant
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.variants import compare_variants
from moekit.jobs.shared.inputs import load_tokenizer
from moekit.trace import Trace
from moekit.trace.streamed import record_streamed

# Total sparsity -> how much some mix must gain over the second stage alone, nats a token.
GAINS = {0.5: 0.03, 0.65: 0.1}


@dataclass(frozen=True)
class Texts:
    """What is decided on, and what is judged on."""

    calibration: CalibrationText
    heldout: list[TokenizedDocument]
    window: int


@dataclass(frozen=True)
class Row:
    """One mix: experts by one method, then zeros by another."""

    name: str
    kept: int
    total: float
    gone: float
    result: PerplexityResult

    @property
    def loss(self) -> float:
        """Nats a token, each domain weighing the same."""
        return loss_of(self.result)


def loss_of(result: PerplexityResult) -> float:
    """Mean over domains of the loss, nats a token."""
    return statistics.fmean(part.nll for part in result.per_domain())


def read_texts(options: argparse.Namespace) -> Texts:
    """Calibration rows and held-out documents."""
    tokenizer = load_tokenizer(str(options.model))
    parts = ("train", "heldout") if options.heldout is None else (None, None)
    rows = take_tokens(load_text(options.data, split=parts[0]), tokenizer, options.tokens)
    heldout = take_tokens(load_text(options.heldout or options.data, split=parts[1]), tokenizer, options.heldout_tokens)
    batches = list(arrange(rows, options.seq_len).batches(8))
    return Texts(CalibrationText(batches, source=options.data), heldout, options.seq_len)


def without_experts(checkpoint: Checkpoint, trace: Trace, name: str, keep: float, folder: Path) -> Checkpoint:
    """The checkpoint with a share of its experts, written to a folder."""
    request = PlanRequest(catalogue.get("prune", name).cls(), Budget(keep=keep))
    plan = plan_weights(checkpoint, trace, request)
    record = Record(command="a benchmark", parent=str(checkpoint.path), parent_fingerprint=checkpoint.fingerprint)
    apply(checkpoint, plan.outcomes, folder, rewrite=rewriter(plan, checkpoint), record=record)
    return Checkpoint.open(folder)


def sparse(checkpoint: Checkpoint, method: SparsifyMethod, totals: Sequence[float], texts: Texts) -> list[Variant]:
    """A variant for each total that what is left can still meet."""
    geometries = geometries_of(checkpoint)
    removed = 1 - expert_weights(geometries) / find_original(checkpoint).weights
    made = []
    for total in totals:
        if total >= removed:
            request = PlanRequest(method, SparsityBudget(sparsity=remaining_sparsity(total, removed), total=total))
            plan = plan_weights(checkpoint, texts.calibration if method.required else None, request)
            made.append(Variant(f"{total}", plan.outcomes, rewriter(plan, checkpoint)))
    return made


def measure(
    checkpoint: Checkpoint, start: str, method: SparsifyMethod, options: argparse.Namespace, texts: Texts
) -> tuple[PerplexityResult, list[Row]]:
    """The checkpoint as it is, and made sparse to each total."""
    variants = sparse(checkpoint, method, options.totals, texts)
    plain, results = compare_variants(checkpoint, texts.heldout, variants, window=texts.window)
    original = find_original(checkpoint).weights
    kept = max(geometry.experts for geometry in geometries_of(checkpoint).values())
    rows = []
    for variant, result in zip(variants, results, strict=True):
        assert isinstance(variant.rewrite, PlannedRewrite)
        gone = variant.rewrite.count.gone_of(original)
        rows.append(Row(start, kept, float(variant.name), gone, result.perplexity))
    return plain, rows


def show(rows: Sequence[Row], alone: Row) -> None:
    """One total, method by method."""
    for row in rows:
        told = ""
        if row is not alone:
            pair = [Evaluation(name=r.name, perplexity=r.result) for r in (alone, row)]
            overall = compare(*pair).overall
            difference = None if overall is None else overall.difference
            if difference is not None:
                told = f" {difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] a token"
        print(f"{row.total:>5.0%} {row.name:<28} {row.gone:9.4%} {row.loss:7.3f} {row.loss - alone.loss:+7.3f}{told}")


def judge(rows: Sequence[Row], name: str, alone: Row, unchanged: float) -> None:
    """Whether the trend of one way to prune holds at one total."""
    mixes = sorted((row for row in rows if row.name.startswith(f"{name} ")), key=lambda row: row.kept)
    if not mixes or alone.total not in GAINS:
        return
    best, gain = min(mixes, key=lambda row: row.loss), GAINS[alone.total]
    gained, cost = alone.loss - best.loss, alone.loss - unchanged
    interior = mixes[0].loss > best.loss
    print(
        f"{alone.total:.0%}, {name} first: best with {best.kept} experts, {gained:+.3f} nats gained ({gain} wanted), "
        f"{gained / cost:.0%} of what {alone.name} costs: {'holds' if gained >= gain else 'does not hold'}; fewer "
        f"experts than that lose: {'holds' if interior else 'does not hold'}"
    )


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/pretrain-tiny/moe"), help="a trained MoE")
    parser.add_argument("--data", default="six-domains", help="text to decide on, of which a part is kept apart")
    parser.add_argument("--heldout", help="text to judge on (default: what is kept apart)")
    parser.add_argument("--totals", type=float, nargs="+", default=[0.4, 0.5, 0.65])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.875, 0.75, 0.625], help="shares of the experts")
    parser.add_argument("--method", default="wanda", help="of the second stage; see moekit methods sparsify")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--heldout-tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a row and a window")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        print(f"there is no model in {options.model}: moekit run recipes/pretrain-tiny.yaml data=TEXT makes one")
        return
    start = time.perf_counter()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    texts, checkpoint = read_texts(options), Checkpoint.open(options.model)
    second: SparsifyMethod = catalogue.get("sparsify", options.method).cls()
    needs = {need for name in ("stun", "reap") for need in catalogue.get("prune", name).cls().required}
    trace = record_streamed(checkpoint, texts.calibration.batches, statistics=("load", *sorted(needs)))
    plain, found = measure(checkpoint, f"{options.method} alone", second, options, texts)
    for other in ("owl", "magnitude"):
        method = catalogue.get("sparsify", other).cls()
        if other != options.method:
            found += measure(checkpoint, f"{other} alone", method, options, texts)[1]
    print(f"{trace.meta.tokens:,} calibration tokens, {plain.overall.tokens:,} unseen; unchanged {loss_of(plain):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("stun", "reap"):
            for keep in options.keep:
                less = without_experts(checkpoint, trace, name, keep, Path(folder) / f"{name}-{keep}")
                first, rows = measure(less, "", second, options, texts)
                kept = rows[0].kept if rows else round(keep * max(trace.meta.experts))
                print(f"{name} to {kept} experts, no zeros: {loss_of(first):.3f}")
                named = [Row(f"{name} to {r.kept}, {options.method}", r.kept, r.total, r.gone, r.result) for r in rows]
                found += named
    print("\ntotal first, then                       gone    loss   against the first line: by domain, and paired")
    for total in options.totals:
        rows = [row for row in found if row.total == total]
        show(rows, rows[0])
    print()
    for total in options.totals:
        rows = [row for row in found if row.total == total]
        for name in ("stun", "reap"):
            judge(rows, name, rows[0], loss_of(plain))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
