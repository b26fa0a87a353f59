"""What the jobs that leave fewer experts do once it is decided: baselines, proof, writing, telling.

Legend: E experts.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moekit._device import named_dtype
from moekit.checking import CheckReport
from moekit.checkpoint import Checkpoint, Record
from moekit.checkpoint.record import TENSORS_FILE
from moekit.compress.engine.apply import apply
from moekit.compress.engine.grouped import by_group, routing_groups
from moekit.compress.engine.inputs import InputsByLayer
from moekit.compress.engine.method import WeightMethod
from moekit.compress.engine.plan import LayerRecord, WeightPlan, make_method
from moekit.compress.engine.planning import decide
from moekit.compress.engine.redirecting import NovicesByLayer, is_redirected
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.rewriting import PlannedRewrite, novices_of, rewriter
from moekit.evaluation.changes import Variant
from moekit.jobs.context import JobContext
from moekit.jobs.options.writing import WritingOptions
from moekit.jobs.shared.checked import DEAD, write_checked
from moekit.jobs.shared.hashes import hash_of
from moekit.jobs.shared.opened import OpenedModel
from moekit.jobs.weights.mtp import mtp_kept
from moekit.jobs.weights.proof import HeldOut, Proof, prove
from moekit.trace.statistics import LayerStatistics

logger = logging.getLogger(__name__)

# Up to so many findings are told one by one.
_FEW = 4


def in_groups(source: OpenedModel, plan: WeightPlan) -> dict[int, LayerRecord]:
    """The layers of a plan, with equally many kept of each routing group where that was asked for."""
    groups = routing_groups(source.checkpoint.config)
    if plan.file.groups == "free" or groups == 1:
        return dict(plan.file.layers)
    return by_group(plan, source.geometries, groups)


def baseline(
    method: WeightMethod[Any, Any],
    source: OpenedModel,
    request: PlanRequest,
    statistics: Mapping[int, LayerStatistics],
    seed: int,
) -> WeightPlan:
    """What a baseline decides on the same budget.

    Args:
        method: the baseline.
        source: the model.
        request: whose budget, groups and protected experts hold.
        statistics: with what it needs.
        seed: of random choices.
    """
    own = dataclasses.replace(request, method=method, seed=seed)
    narrow = {
        layer: LayerStatistics(
            g.experts,
            g.hidden,
            statistics[layer].domains if layer in statistics else (),
            statistics[layer].tokens if layer in statistics else 0,
            {needed: statistics[layer][needed] for needed in method.required},
            width=g.width,
        )
        for layer, g in source.geometries.items()
    }
    inputs = InputsByLayer(source.geometries, narrow, None, seed, own.protected)
    plan = decide(source.checkpoint, inputs, own, narrow, None)
    return WeightPlan(plan.file.model_copy(update={"layers": in_groups(source, plan)}), narrow)


def log_warnings(plan: WeightPlan) -> list[str]:
    """What a reader must know of a plan's data; also logged, in fewer words."""
    unseen = {layer: told for layer, told in plan.file.layers.items() if told.never_routed}
    if unseen:
        logger.warning(
            "%d experts in %d of %d layers were never routed in the calibration text; %s%d of them stay",
            sum(len(told.never_routed) for told in unseen.values()),
            len(unseen),
            len(plan.file.layers),
            "they rank below all others, and " if plan.file.kind == "prune" else "",
            sum(len(set(told.never_routed) & set(told.outcome.keep)) for told in unseen.values()),
        )
    for line in plan.file.warnings[len(unseen) :]:
        logger.warning("%s", line)
    if is_redirected(plan.outcomes):
        logger.warning(
            "tokens go on choosing among all of the old experts, by a routing policy that moekit.load attaches: stock "
            "transformers opens the result without it and sends them to the experts that are left"
        )
    return list(plan.file.warnings)


@dataclass
class Decided:
    """A plan, and what is needed to prove it and to carry it out.

    Attributes:
        source: the model.
        request: what was asked for.
        plan: what was decided.
        statistics: decoder layer -> what baselines decide from; empty without.
        rewrite: makes new weights; None where experts are only dropped.
        novices: decoder layer -> constants that answer for experts whose tokens go to nobody.
        others: name -> what baselines decided, where their weights were made with the plan's; None where not.
    """

    source: OpenedModel
    request: PlanRequest
    plan: WeightPlan
    statistics: Mapping[int, LayerStatistics] = field(default_factory=dict)
    rewrite: PlannedRewrite | None = None
    novices: NovicesByLayer = field(default_factory=dict)
    others: list[tuple[str, WeightPlan]] | None = None


def baselines_of(decided: Decided, random_seeds: int) -> list[tuple[str, WeightPlan]]:
    """The method's baselines on the same budget, as far as they can be made and are not the method itself."""
    request, known, own = decided.request, decided.statistics, decided.plan.file
    found: list[tuple[str, WeightPlan]] = []
    for name, settings, kind in decided.plan.method.baselines:
        method = make_method(kind or own.kind, name, settings)
        measured = all(need in known[layer] for need in method.required for layer in known)
        if name == own.method or (method.required and not (known and measured)):
            continue
        seeds = random_seeds if name.startswith("random") else 1
        for number in range(seeds):
            label = name if seeds == 1 else f"{name} {number}"
            found.append((label, baseline(method, decided.source, request, known, request.seed + number)))
    return found


def baseline_needs(method: WeightMethod[Any, Any], kind: str) -> tuple[str, ...]:
    """Statistics that a method's baselines decide from.

    Args:
        method: whose baselines.
        kind: of the method.
    """
    made = [make_method(b.kind or kind, b.name, b.settings) for b in method.baselines]
    return tuple(dict.fromkeys(need for baseline in made for need in baseline.required))


def _variant(name: str, plan: WeightPlan, source: OpenedModel) -> Variant:
    rewrite, novices = rewriter(plan, source.checkpoint), novices_of(plan, source.checkpoint)
    return Variant(name, plan.outcomes, rewrite, plan.file.top_k, plan.file.groups, novices)


def prove_plan(decided: Decided, heldout: HeldOut, options: WritingOptions, context: JobContext) -> Proof:
    """Measure a plan against its baselines on held-out text."""
    file = decided.plan.file
    others = baselines_of(decided, options.random_seeds) if decided.others is None else decided.others
    return prove(
        decided.source.checkpoint,
        heldout,
        Variant(file.method, decided.plan.outcomes, decided.rewrite, file.top_k, file.groups, decided.novices),
        [_variant(name, plan, decided.source) for name, plan in others],
        key=hash_of([decided.plan.hash, *([name, plan.hash] for name, plan in others), options.dtype]),
        folder=context.scratch / "proof",
        seed=context.seed,
        dtype=named_dtype(options.dtype),
        device=options.device,
        progress=context.progress,
    )


def write_pruned(
    decided: Decided, proof: Proof | None, options: WritingOptions, context: JobContext
) -> tuple[Record, CheckReport]:
    """Write what was decided; it takes its name once it has been checked.

    Raises:
        BadCheckpoint: what was written is not what it must be; nothing is left.
        OutOfBudget: not enough disk.
    """
    file = decided.plan.file
    told = file.model_dump(
        mode="json", include={"kind", "method", "settings", "budget", "top_k", "groups", "data", "tokens"}
    )
    told |= {} if file.repair is None else {"repair": file.repair.model_dump(mode="json")}
    before = Record(
        command=context.command,
        parent=decided.source.parent,
        parent_fingerprint=decided.source.checkpoint.fingerprint,
        seed=context.seed,
        plan_hash=decided.plan.hash,
        config=told,
        scores={} if proof is None else {"proof": proof.short()},
    )
    record, report = write_checked(
        context,
        lambda folder: apply(
            decided.source.checkpoint,
            decided.plan.outcomes,
            folder,
            rewrite=decided.rewrite,
            novices=decided.novices,
            record=before,
            top_k=file.top_k,
            groups=file.groups,
            mtp=options.mtp,
            mtp_kept=mtp_kept(decided.plan, decided.source.checkpoint, options.mtp),
            stock_only=options.stock_only,
            progress=context.progress,
        ),
        most=_FEW,
    )
    silent = sum(finding.code == DEAD for finding in report.findings)
    if silent:
        logger.warning("%s: %d experts that stay can only answer zero, as in the source", context.out, silent)
    return record, report


def summary_of_plan(decided: Decided, warnings: Sequence[str], nbytes: int) -> dict[str, Any]:
    """What a plan says, as plain values."""
    file = decided.plan.file
    before = sum(told.experts for told in file.layers.values())
    after = sum(len(told.outcome.keep) for told in file.layers.values())
    return {
        "method": file.method,
        "settings": file.settings,
        "repair": None if file.repair is None else file.repair.model_dump(mode="json"),
        "budget": file.budget.model_dump(mode="json"),
        "top_k": file.top_k,
        "groups": file.groups,
        "model": file.model,
        "plan": decided.plan.hash,
        "tokens": file.tokens,
        "domains": list(file.domains),
        "experts": {"before": before, "after": after},
        "bytes": {"before": decided.source.nbytes, "after": nbytes},
        "layers": [
            {
                "layer": layer,
                "experts": told.experts,
                "kept": list(told.outcome.keep),
                "never_routed": list(told.never_routed),
                "protected": list(file.protected.get(layer, ())),
                "figures": dict(told.outcome.figures),
            }
            for layer, told in file.layers.items()
        ],
        "warnings": list(warnings),
    }


def finish(
    decided: Decided, heldout: HeldOut | None, options: WritingOptions, context: JobContext, warnings: Sequence[str]
) -> dict[str, Any]:
    """Prove, write, check, and tell all of it."""
    decided.rewrite = rewriter(decided.plan, decided.source.checkpoint, folder=context.scratch / "rewritten")
    decided.novices = novices_of(decided.plan, decided.source.checkpoint)
    proof = None if heldout is None else prove_plan(decided, heldout, options, context)
    record, report = write_pruned(decided, proof, options, context)
    beside = context.out / TENSORS_FILE
    nbytes = Checkpoint.open(context.out).nbytes + (beside.stat().st_size if beside.exists() else 0)
    results = summary_of_plan(decided, warnings, nbytes)
    for layer in results["layers"]:
        layer["figures"] |= {} if decided.rewrite is None else decided.rewrite.figures.get(layer["layer"], {})
    return {
        **results,
        "proof": None if proof is None else proof.model_dump(mode="json"),
        "check": {
            "ok": report.ok,
            "proven": report.proven,
            "tensors": len(record.expectations.tensors),
            "findings": [str(finding) for finding in report.findings],
        },
    }
