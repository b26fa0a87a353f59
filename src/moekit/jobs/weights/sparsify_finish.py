"""What the sparsify step does once a plan is made: baseline, proof, writing, telling."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moekit.checking import CheckReport
from moekit.checkpoint import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.plan import WeightPlan, make_method, zero_budget
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.rewriting import PlannedRewrite, rewriter
from moekit.evaluation.changes import Variant
from moekit.jobs.context import JobContext
from moekit.jobs.shared.checked import write_checked
from moekit.jobs.shared.hashes import hash_of
from moekit.jobs.shared.opened import OpenedModel
from moekit.jobs.weights.proof import HeldOut, Proof, prove

logger = logging.getLogger(__name__)

# Up to so many warnings are logged one by one.
_FEW = 4


@dataclass(frozen=True)
class Placed:
    """Where layers run, and in which dtype; None as stored."""

    device: str
    dtype: torch.dtype | None


def finish(
    plan: WeightPlan, source: OpenedModel, heldout: HeldOut | None, machine: Placed, context: JobContext
) -> dict[str, Any]:
    """Prove, write, check, and tell all of it.

    Raises:
        BadCheckpoint: what was written is not what it must be; nothing is left.
        OutOfBudget: not enough disk.
    """
    proof = None if heldout is None else _prove(plan, source, heldout, machine, context)
    zeros = rewriter(plan, source.checkpoint)
    assert zeros is not None
    record, report = _write(plan, source, zeros, proof, context)
    return {
        **summary_of(plan, zeros),
        "proof": None if proof is None else proof.model_dump(mode="json"),
        "check": {
            "ok": report.ok,
            "proven": report.proven,
            "tensors": len(record.expectations.tensors),
            "findings": [str(finding) for finding in report.findings],
        },
    }


def _prove(plan: WeightPlan, source: OpenedModel, heldout: HeldOut, machine: Placed, context: JobContext) -> Proof:
    others = _baselines(plan, source)
    return prove(
        source.checkpoint,
        heldout,
        _variant(plan, source),
        [_variant(other, source) for other in others],
        key=hash_of(["sparsify", plan.hash, *(other.hash for other in others), str(machine.dtype)]),
        folder=context.scratch / "proof",
        seed=context.seed,
        dtype=machine.dtype,
        device=machine.device,
        progress=context.progress,
    )


def _variant(plan: WeightPlan, source: OpenedModel) -> Variant:
    return Variant(plan.file.method, plan.outcomes, rewriter(plan, source.checkpoint))


def _baselines(plan: WeightPlan, source: OpenedModel) -> list[WeightPlan]:
    """What the method's baselines decide at the same sparsity; none where that is the method itself."""
    return [
        plan_weights(
            source.checkpoint, None, PlanRequest(make_method("sparsify", b.name, b.settings), plan.file.budget)
        )
        for b in plan.method.baselines
        if b.name != plan.file.method
    ]


def _write(
    plan: WeightPlan, source: OpenedModel, zeros: PlannedRewrite, proof: Proof | None, context: JobContext
) -> tuple[Record, CheckReport]:
    """Write the sparse model; it takes its name once it has been checked."""
    told = {"method", "settings", "data", "tokens"}
    record = Record(
        command=context.command,
        parent=source.parent,
        parent_fingerprint=source.checkpoint.fingerprint,
        seed=context.seed,
        plan_hash=plan.hash,
        config=plan.file.model_dump(mode="json", include=told) | plan.file.budget.model_dump(mode="json"),
        scores={} if proof is None else {"proof": proof.short()},
    )
    # No row or matrix loses all of its weights: an expert that can only answer zero was so in the source.
    return write_checked(
        context,
        lambda folder: apply(
            source.checkpoint,
            plan.outcomes,
            folder,
            rewrite=zeros,
            record=record,
            mtp="keep",
            progress=context.progress,
        ),
        most=_FEW,
    )


def summary_of(plan: WeightPlan, zeros: PlannedRewrite | None) -> dict[str, Any]:
    """What a plan says and, once it was carried out, the zeros counted, as plain values.

    Args:
        plan: the plan.
        zeros: what carried it out; None where nothing did.
    """
    file = plan.file
    budget = zero_budget(file.budget)
    count = None if zeros is None else zeros.count
    gone = None if count is None or budget.original is None else count.gone_of(budget.original)
    return {
        "method": file.method,
        "settings": file.settings,
        "sparsity": budget.sparsity,
        "total": budget.total,
        "model": file.model,
        "plan": plan.hash,
        "tokens": file.tokens,
        "weights": {
            "original": budget.original,
            "present": budget.weights,
            "zeros": None if count is None else count.zeros,
            "sparsity": None if count is None else count.sparsity,
            "total": gone,
        },
        "layers": [
            {
                "layer": layer,
                "experts": told.experts,
                "sparsity": told.outcome.sparsity,
                "zeros": None if zeros is None else zeros.counts[layer].sparsity,
                "never_routed": list(told.never_routed),
                "figures": dict(told.outcome.figures),
            }
            for layer, told in file.layers.items()
        ],
        "warnings": list(file.warnings),
    }


def log_warnings(lines: Sequence[str]) -> None:
    """Log what a reader must know, each kind at most a few times."""
    for line in lines[:_FEW]:
        logger.warning("%s", line)
    if len(lines) > _FEW:
        logger.warning("and %d more warnings, in the plan and in --json", len(lines) - _FEW)
