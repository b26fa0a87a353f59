"""From text to a plan that leaves every expert and changes its weights."""

from __future__ import annotations

from pathlib import Path

from moekit._device import named_dtype
from moekit._progress import Progress
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.data import Document
from moekit.jobs.options.inplace import InPlaceOptions
from moekit.jobs.shared.hashes import text_hash
from moekit.jobs.shared.inputs import calibration_rows
from moekit.jobs.shared.opened import OpenedModel
from moekit.jobs.weights.inplace_request import Asked, proves
from moekit.jobs.weights.plans import named, origin
from moekit.jobs.weights.proof import HeldOut
from moekit.jobs.weights.texts import heldout_of_plan, read_texts


def decide(
    options: InPlaceOptions, asked: Asked, scratch: Path, progress: Progress | None
) -> tuple[WeightPlan, HeldOut | None]:
    """Run the text through the model layer by layer and let the method decide, or take the stored plan.

    Args:
        options: of the job.
        asked: the model, and what was asked for.
        scratch: for hidden states.
        progress: told layer by layer.

    Returns:
        The plan, and text to prove it on; None where nothing is proved.

    Raises:
        BadData: no text.
        BadCheckpoint: weights are damaged.
    """
    if asked.plan is not None:
        heldout = heldout_of_plan(asked.plan, options, asked.source, progress) if proves(options) else None
        return asked.plan, heldout
    assert asked.request is not None
    apart = options.heldout is None
    documents, heldout = read_texts(options, asked.source, progress, apart=apart, proves=proves(options))
    return _plan(options, documents, asked.source, asked.request, scratch, progress), heldout


def _plan(
    options: InPlaceOptions,
    documents: list[Document],
    source: OpenedModel,
    request: PlanRequest,
    scratch: Path,
    progress: Progress | None,
) -> WeightPlan:
    text = None
    if documents:
        tokenizer, length = source.tokenizer(), min(options.seq_len, source.longest)
        rows = calibration_rows(
            documents,
            tokenizer,
            seq_len=length,
            max_tokens=options.max_tokens,
            bos=options.bos,
            pictures=source.pictures(documents),
        )
        text = CalibrationText(
            list(rows.batches(options.batch_size)),
            scratch / "calibration",
            named_dtype(options.dtype),
            options.device,
            tokenizer,
            origin(options.data, apart=options.heldout is None),
        )
    plan = plan_weights(source.checkpoint, text, request, progress)
    kept = named(options.data) if options.data is not None and options.heldout is None else ""
    return WeightPlan(
        plan.file.model_copy(update={"kept_apart": kept, "text_sha256": text_hash(options.data)}), plan.statistics
    )
