"""What a job does that leaves every expert, once a plan is made: baseline, proof, writing, checking."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moekit.checking import CheckReport
from moekit.checkpoint import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.grids import grids_told
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.rewriting import PlannedRewrite, rewriter
from moekit.evaluation.changes import Variant
from moekit.jobs.context import JobContext
from moekit.jobs.shared.checked import write_checked
from moekit.jobs.shared.hashes import hash_of
from moekit.jobs.shared.opened import OpenedModel
from moekit.jobs.weights.inplace_decide import Decided
from moekit.jobs.weights.inplace_request import mtp_of
from moekit.jobs.weights.proof import HeldOut, Proof, prove

logger = logging.getLogger(__name__)

# Up to so many warnings are logged one by one.
_FEW = 4


@dataclass(frozen=True)
class Placed:
    """Where layers run, and in which dtype; None as stored."""

    device: str
    dtype: torch.dtype | None


Summary = Callable[[WeightPlan, PlannedRewrite | None], dict[str, Any]]


def finish(
    decided: Decided,
    source: OpenedModel,
    machine: Placed,
    context: JobContext,
    summary: Summary,
) -> dict[str, Any]:
    """Prove, write, check, and tell all of it.

    Args:
        decided: the plan, and what it is proved with.
        source: the model.
        machine: where layers run.
        context: where to write.
        summary: (plan, what carried it out) -> what the kind tells of them.

    Raises:
        BadCheckpoint: what was written is not what it must be; nothing is left.
        OutOfBudget: not enough disk.
    """
    plan, heldout = decided.plan, decided.heldout
    proof = None if heldout is None else _prove(decided, source, heldout, machine, context)
    made = rewriter(plan, source.checkpoint)
    assert made is not None
    record, report = _write(plan, source, made, proof, context)
    return {
        **summary(plan, made),
        "proof": None if proof is None else proof.model_dump(mode="json"),
        "check": {
            "ok": report.ok,
            "proven": report.proven,
            "tensors": len(record.expectations.tensors),
            "findings": [str(finding) for finding in report.findings],
        },
    }


def _prove(decided: Decided, source: OpenedModel, heldout: HeldOut, machine: Placed, context: JobContext) -> Proof:
    plan = decided.plan
    others = {other.file.method: other for other in decided.baselines} | dict(decided.others)
    return prove(
        source.checkpoint,
        heldout,
        _variant(plan.file.method, plan, source),
        [_variant(name, other, source) for name, other in others.items()],
        key=hash_of([plan.file.kind, plan.hash, *((n, other.hash) for n, other in others.items()), str(machine.dtype)]),
        folder=context.scratch / "proof",
        seed=context.seed,
        dtype=machine.dtype,
        device=machine.device,
        progress=context.progress,
    )


def _variant(name: str, plan: WeightPlan, source: OpenedModel) -> Variant:
    return Variant(name, plan.outcomes, rewriter(plan, source.checkpoint), cuts=plan.file.cuts)


def _write(
    plan: WeightPlan, source: OpenedModel, made: PlannedRewrite, proof: Proof | None, context: JobContext
) -> tuple[Record, CheckReport]:
    """Write the changed model; it takes its name once it has been checked."""
    told = {"method", "settings", "data", "tokens"}
    record = Record(
        command=context.command,
        parent=source.parent,
        parent_fingerprint=source.checkpoint.fingerprint,
        seed=context.seed,
        plan_hash=plan.hash,
        config=plan.file.model_dump(mode="json", include=told) | plan.file.budget.model_dump(mode="json"),
        scores=grids_told(plan.method, plan.outcomes) | ({} if proof is None else {"proof": proof.short()}),
    )
    # No row or matrix loses all of its weights: an expert that can only answer zero was so in the source.
    return write_checked(
        context,
        lambda folder: apply(
            source.checkpoint,
            plan.outcomes,
            folder,
            rewrite=made,
            record=record,
            mtp=mtp_of(plan.outcomes, plan.file.cuts),
            cuts=plan.file.cuts,
            progress=context.progress,
        ),
        most=_FEW,
    )


def log_warnings(lines: Sequence[str]) -> None:
    """Log what a reader must know, each kind at most a few times."""
    for line in lines[:_FEW]:
        logger.warning("%s", line)
    if len(lines) > _FEW:
        logger.warning("and %d more warnings, in the plan and in --json", len(lines) - _FEW)
