"""The stages of a job that leaves every expert and changes its weights; kinds say what they ask for and tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.inplace import InPlaceOptions
from moekit.jobs.shared.inputs import lies_here, model_item, text_item
from moekit.jobs.weights.inplace_request import Asked, stored_plan
from moekit.jobs.weights.plans import PLAN_BYTES, plan_path

_STREAMED = "layers are read from disk one at a time: memory does not grow with their number"


def estimate_of(
    options: InPlaceOptions,
    out: Path,
    sizes: ByteSizes,
    ask: Callable[[], Asked],
    notes: Sequence[str] = (_STREAMED,),
) -> JobEstimate:
    """As large as the model: changed weights are stored as they were.

    Args:
        options: of the job.
        out: where it would write.
        sizes: bytes of what is there or will be.
        ask: opens the model; called where it lies here.
        notes: what else a reader of the estimate must know.
    """
    reference = options.model
    reads = [text_item(text, sizes) for text in (options.data, options.heldout) if text]
    if options.from_plan is not None:
        reads.append(sizes.item(options.from_plan))
        plan = stored_plan(options) if plan_path(options.from_plan).is_file() else None
        reference = None if plan is None else plan.file.model
    if reference is None:
        return JobEstimate(tuple(reads), (Item(str(out), None),))
    model = model_item(reference, sizes)
    plan_only = options.write == "plan"
    if model.nbytes is None or not lies_here(reference):
        nbytes = PLAN_BYTES if plan_only else model.nbytes
        return JobEstimate((model, *reads), (Item(str(out), nbytes),), disk=nbytes, notes=tuple(notes))
    asked = ask()
    written = asked.plan_bytes if plan_only else asked.written
    return JobEstimate(
        (model, *reads),
        (Item(str(out), written),),
        disk=written + asked.between,
        memory=asked.memory,
        notes=tuple(notes),
    )


def settings_told(plan: Any) -> dict[str, Any]:
    """What every result says of the plan behind it."""
    file = plan.file
    return {
        "method": file.method,
        "settings": file.settings,
        "model": file.model,
        "plan": plan.hash,
        "tokens": file.tokens,
        "warnings": list(file.warnings),
    }
