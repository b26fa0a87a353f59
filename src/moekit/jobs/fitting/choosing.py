"""Which plan is best: those of least expected cost, what each kind alone makes of the bytes, and random ones, measured.

The best is chosen on one half of the documents and measured on the other: on the text that it was chosen on it looks
better than it is. Costs of layers are added up as if layers did not know of each other. Whether that holds for this
model is told by the rank correlation of expected and measured costs over all plans that were measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moekit._device import named_dtype
from moekit._files import read_text
from moekit.checkpoint.atomic import atomic_write
from moekit.compress.joint.planning import JointPlan, Planner
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.variants import VariantResult, compare_variants
from moekit.jobs.context import JobContext
from moekit.jobs.fitting.carrying import Carrier
from moekit.jobs.fitting.request import Asked
from moekit.jobs.options.fit import FitOptions
from moekit.jobs.shared.hashes import hash_of
from moekit.jobs.weights.proof import HeldOut, Proof, proof_of


@dataclass(frozen=True)
class Tried:
    """A plan, and what it was measured to cost.

    Attributes:
        plan: the plan.
        measured: KL of the unchanged model's predictions to the plan's on the held-out documents that nothing was
            chosen on, nats a token; None where it was not measured.
        rise: of the loss there, nats a token; falls where a text is unlike what the model knows.
        chosen_on: KL on the other half of the documents, by which plans were ordered.
    """

    plan: JointPlan
    measured: float | None = None
    chosen_on: float | None = None
    rise: float | None = None


@dataclass(frozen=True)
class Chosen:
    """The plan that is taken, and what it was chosen from.

    Attributes:
        plan: the best.
        tried: all plans, best first.
        correlation: of the ranks of expected and measured costs, all documents; None with fewer than three different
            plans.
        proof: held-out text, the best plan against the others; None where nothing was measured.
    """

    plan: JointPlan
    tried: list[Tried]
    correlation: float | None
    proof: Proof | None


def candidates(options: FitOptions, asked: Asked, planner: Planner, seed: int) -> list[JointPlan]:
    """Plans worth measuring, all different: the best by expected cost, single kinds, random ones."""
    best = planner.plans(asked.budget)[: options.tries]
    singles = [planner.uniform(name, recipe) for name, recipe in asked.menu.singles.items()]
    found: dict[str, JointPlan] = {}
    by_chance = planner.random(asked.budget, options.random_plans, seed) if options.proof else []
    for plan in [*best, *singles, *by_chance]:
        known = found.get(plan.hash)
        # A single kind may be the best plan: then it goes by the name that says so.
        found[plan.hash] = plan if known is None else known.model_copy(update={"name": f"{known.name} ({plan.name})"})
    return list(found.values())


def choose(
    options: FitOptions, asked: Asked, planner: Planner, carrier: Carrier, heldout: HeldOut | None, context: JobContext
) -> Chosen:
    """Measure plans side by side on held-out text, and take the best; without text, that of least expected cost."""
    plans = candidates(options, asked, planner, context.seed)
    if heldout is None:
        ordered = sorted(plans, key=lambda plan: (plan.cost, plan.counted))
        return Chosen(ordered[0], [Tried(plan) for plan in ordered], None, None)
    plain, results = _measured(options, asked, plans, carrier, heldout, context)
    first, second = halves(plain)
    near, far, whole = (
        [_apart(r if part is None else r.only(part)) for r in results] for part in (first, second, None)
    )
    order = sorted(range(len(plans)), key=lambda n: (near[n], plans[n].counted, n))
    plain, results = plain.only(second), [result.only(second) for result in results]
    proof = proof_of(heldout, plain, [results[n] for n in order], context.seed)
    tried = [Tried(plans[n], far[n], near[n], _rise(plain, results[n])) for n in order]
    return Chosen(plans[order[0]], tried, rank_correlation([p.cost for p in plans], whole), proof)


def halves(text: PerplexityResult) -> tuple[list[int], list[int]]:
    """Documents to choose on, and documents to measure the choice on: of each domain, every other one.

    Where that would leave either without a document both are all of them, which flatters the choice.
    """
    scored = [[n for n in numbers if text.tokens[n]] for numbers in text.indices().values()]
    first, second = (sorted(n for numbers in scored for n in numbers[start::2]) for start in (0, 1))
    return (first, second) if second else (first, first)


def _apart(result: VariantResult) -> float:
    return math.inf if result.divergence is None else result.divergence


def _rise(plain: PerplexityResult, result: VariantResult) -> float:
    before, after = plain.overall.perplexity, result.perplexity.overall.perplexity
    return math.log(after) - math.log(before) if math.isfinite(after) else math.inf


def rank_correlation(expected: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's; equal values share their mean rank. None with fewer than three plans, or where all are equal."""
    if len(expected) < 3 or len(set(expected)) < 2 or len(set(measured)) < 2:
        return None
    from scipy.stats import rankdata

    first, second = (rankdata(values) for values in (expected, measured))
    first, second = first - first.mean(), second - second.mean()
    return float((first * second).sum() / math.sqrt(float((first**2).sum()) * float((second**2).sum())))


def _measured(
    options: FitOptions,
    asked: Asked,
    plans: Sequence[JointPlan],
    carrier: Carrier,
    heldout: HeldOut,
    context: JobContext,
) -> tuple[PerplexityResult, list[VariantResult]]:
    """Likelihoods of the unchanged model and under each plan; those that an interrupted run has measured are read."""
    folder = context.scratch / "proof"
    folder.mkdir(parents=True, exist_ok=True)
    key = hash_of([[(plan.name, plan.hash) for plan in plans], asked.composer.told, heldout.digest, options.dtype])
    file = folder / f"measured-{key[:32]}.json"
    known = _read(file)
    if known is not None:
        return known
    plain, results = compare_variants(
        asked.source.checkpoint,
        heldout.documents,
        [carrier.variant(plan) for plan in plans],
        window=heldout.window,
        folder=folder,
        dtype=named_dtype(options.dtype),
        device=options.device,
        divergence=True,
        progress=context.progress,
    )
    told: list[Any] = [plain.model_dump(mode="json"), [result.model_dump(mode="json") for result in results]]
    atomic_write(file, json.dumps(told))
    return plain, results


def _read(file: Path) -> tuple[PerplexityResult, list[VariantResult]] | None:
    try:
        plain, results = json.loads(read_text(file))
        return PerplexityResult.model_validate(plain), [VariantResult.model_validate(result) for result in results]
    except (OSError, ValueError, ValidationError):
        return None
