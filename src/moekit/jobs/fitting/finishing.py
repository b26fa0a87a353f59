"""Write the model that a plan makes, check it, and tell what was expected and what was measured."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from moekit.checking import CheckReport
from moekit.checkpoint import Checkpoint, Record
from moekit.checkpoint.atomic import atomic_write
from moekit.compress.engine.apply import apply
from moekit.compress.engine.grids import grids_told
from moekit.compress.joint.planning import JointPlan, Planner
from moekit.jobs.context import JobContext
from moekit.jobs.fitting.carrying import Carrier
from moekit.jobs.fitting.choosing import Chosen, Tried
from moekit.jobs.fitting.costs import Priced
from moekit.jobs.fitting.request import Asked
from moekit.jobs.shared.checked import write_checked

logger = logging.getLogger(__name__)

# Up to so many findings are told one by one.
_FEW = 4
# Rank correlations from which expected costs are trusted, and from which they are of use.
TRUSTED, USEFUL = 0.9, 0.7


def plan_told(asked: Asked, plan: JointPlan, priced: Priced) -> dict[str, Any]:
    """A plan as plain data, with what it was made for and from."""
    return {
        "kind": "fit",
        "engine": asked.profile.name,
        "budget": asked.budget,
        "methods": priced.table.methods,
        "group": priced.table.group,
        "price": priced.table.price,
        "tokens": priced.table.tokens,
        "recipes": {layer: recipe.model_dump(exclude_none=True) for layer, recipe in plan.recipes.items()},
    }


def save_plan(path: Path, asked: Asked, plan: JointPlan, priced: Priced) -> None:
    """Write a plan as JSON."""
    told = plan_told(asked, plan, priced) | {
        "model": asked.source.parent,
        "fingerprint": asked.source.checkpoint.fingerprint,
        "plan": plan.model_dump(mode="json"),
        "hash": plan.hash,
    }
    atomic_write(path, json.dumps(told, indent=1) + "\n")


def write_model(
    asked: Asked, chosen: Chosen, priced: Priced, carrier: Carrier, context: JobContext
) -> tuple[Record, CheckReport]:
    """Write the model; it takes its name once it has been checked.

    Raises:
        BadCheckpoint: what was written is not what it must be; nothing is left.
        OutOfBudget: not enough disk.
    """
    plan, source, outcomes = chosen.plan, asked.source, carrier.outcomes(chosen.plan)
    rounded = {layer: outcome for layer, outcome in outcomes.items() if outcome.bits}
    grids = grids_told(asked.composer.rounding, rounded) if rounded else {}
    record = Record(
        command=context.command,
        parent=source.parent,
        parent_fingerprint=source.checkpoint.fingerprint,
        seed=context.seed,
        plan_hash=plan.hash,
        config=plan_told(asked, plan, priced),
        scores=grids | ({} if chosen.proof is None else {"proof": chosen.proof.short()}),
    )
    return write_checked(
        context,
        lambda folder: apply(
            source.checkpoint,
            outcomes,
            folder,
            rewrite=carrier.rewrite(plan),
            record=record,
            stock_only=asked.profile.even,
            progress=context.progress,
        ),
        most=_FEW,
    )


def summary(asked: Asked, chosen: Chosen, priced: Priced, planner: Planner, points: int) -> dict[str, Any]:
    """What was decided, expected and measured, as plain values."""
    plan = chosen.plan
    measured = next(tried.measured for tried in chosen.tried if tried.plan is plan)
    return {
        "engine": asked.profile.name,
        "model": asked.source.parent,
        "methods": priced.table.methods,
        "plan": plan.hash,
        "name": plan.name,
        "tokens": priced.table.tokens,
        "price": priced.table.price,
        "bytes": {
            "before": asked.sizes.full(),
            "budget": asked.budget,
            "least": asked.floor,
            "after": plan.counted,
            "folder": plan.stored,
        },
        "packed": asked.profile.packed if plan.counted != plan.stored else "",
        "expected": plan.cost,
        "bound": plan.bound,
        "measured": measured,
        "correlation": chosen.correlation,
        "tried": [_tried_told(tried) for tried in chosen.tried],
        "front": [{"bytes": p.counted, "expected": p.cost, "recipes": p.told} for p in planner.front(points)],
        "layers": [
            {
                "layer": layer,
                "recipe": str(share.recipe),
                "experts": share.recipe.experts(asked.source.geometries[layer].experts),
                "width": share.recipe.width or asked.source.geometries[layer].width,
                "bits": share.recipe.bits,
                "bytes": share.counted,
                "expected": share.cost,
            }
            for layer, share in plan.layers.items()
        ],
        "refused": {str(recipe): reason for recipe, reason in asked.sizes.refused.items()},
        "warnings": warnings_of(asked, chosen, priced),
    }


def _tried_told(tried: Tried) -> dict[str, Any]:
    return {
        "name": tried.plan.name,
        "recipes": tried.plan.told,
        "bytes": tried.plan.counted,
        "expected": tried.plan.cost,
        "measured": tried.measured,
        "chosen_on": tried.chosen_on,
        "rise": tried.rise,
    }


def warnings_of(asked: Asked, chosen: Chosen, priced: Priced) -> list[str]:
    """What a reader must know of the plan and its figures."""
    found = []
    if priced.why:
        found.append(
            f"costs are changes of the residual stream, not nats ({priced.why}): they rank plans, and say no more"
        )
    unseen = sum(len(statistics.never_routed) for statistics in priced.statistics.values())
    if unseen:
        found.append(f"{unseen} experts were never routed in the text that costs were measured on")
    if chosen.correlation is not None and chosen.correlation < USEFUL:
        found.append(
            f"expected costs hardly rank these plans (rank correlation {chosen.correlation:.2f}): trust the measured "
            "ones alone, and measure more plans (--tries, --random-plans)"
        )
    if chosen.plan.name.startswith("random"):
        found.append("a plan drawn by chance was measured better than those of least expected cost: measure more")
    if asked.profile.packed and chosen.plan.counted != chosen.plan.stored:
        found.append(
            f"the folder holds rounded weights in the source's dtype, {chosen.plan.stored:,} bytes: it is to be "
            f"exported as {asked.profile.packed}, which takes {chosen.plan.counted:,}"
        )
    return found


def check_told(record: Record, report: CheckReport) -> dict[str, Any]:
    """What the check of the written folder found."""
    return {
        "ok": report.ok,
        "proven": report.proven,
        "tensors": len(record.expectations.tensors),
        "findings": [str(finding) for finding in report.findings],
    }


def stored_bytes(folder: Path) -> int:
    """Bytes of a written folder's weight files."""
    checkpoint = Checkpoint.open(folder)
    return sum((checkpoint.path / shard).stat().st_size for shard in checkpoint.shards)
