"""From text to a plan that leaves every expert and changes its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit._device import named_dtype
from moekit._progress import Progress
from moekit.compress.engine.dense_cuts import InputCut
from moekit.compress.engine.making import make_layers
from moekit.compress.engine.plan import WeightPlan, make_method
from moekit.compress.engine.planning import decide as plan_decided, inputs_of, plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.data import Document, load_text
from moekit.errors import BadConfig
from moekit.jobs.options.inplace import InPlaceOptions
from moekit.jobs.shared.hashes import text_hash
from moekit.jobs.shared.inputs import calibration_rows
from moekit.jobs.shared.opened import OpenedModel
from moekit.jobs.weights.dense_parts import decided_cuts
from moekit.jobs.weights.inplace_request import Asked, proves, reads_whole
from moekit.jobs.weights.plans import named, origin
from moekit.jobs.weights.proof import HeldOut
from moekit.jobs.weights.self_calibration import load_for_answers
from moekit.jobs.weights.texts import check_unchanged, heldout_of_plan, read_texts
from moekit.trace import Trace, record
from moekit.trace.loss import Loss, next_token_loss
from moekit.trace.recording import Recording
from moekit.trace.statistics import LayerStatistics

logger = logging.getLogger(__name__)

# Other ways to spend the same budget, which the proof shows beside the plan: name -> request.
Others = Callable[[WeightPlan], Mapping[str, PlanRequest]]


@dataclass(frozen=True)
class Decided:
    """A plan, and what it is proved with.

    Attributes:
        plan: what becomes of the weights.
        heldout: text to prove it on; None where nothing is proved.
        baselines: what the method's baselines decide on the same budget, where it is proved.
        others: name -> plan of another way to spend the same budget, made on the same text.
    """

    plan: WeightPlan
    heldout: HeldOut | None
    baselines: Sequence[WeightPlan] = ()
    others: Mapping[str, WeightPlan] = field(default_factory=dict)


def decide(
    options: InPlaceOptions,
    asked: Asked,
    scratch: Path,
    progress: Progress | None,
    others: Others | None = None,
    loss: Callable[[], Loss] | None = None,
) -> Decided:
    """Run the text through the model and let the method decide, or take the stored plan.

    Layers run one at a time, unless the method looks at gradients, which need the whole model.

    A stored plan whose weights are made as the text passes by goes through that text again. Weights of the plan and of
    its baselines that are made of what experts are given are made in one pass.

    Args:
        options: of the job.
        asked: the model, and what was asked for.
        scratch: for hidden states.
        progress: told layer by layer.
        others: what else the proof shows, once the plan is made; None for nothing.
        loss: makes what gradients are taken of, where a method reads any; None for next-token cross-entropy.

    Raises:
        BadData: no text.
        BadConfig: the text of a stored plan, which must be gone through again, has changed.
        BadCheckpoint: weights are damaged.
    """
    source = asked.source
    if asked.plan is not None:
        heldout = heldout_of_plan(asked.plan, options, source, progress) if proves(options) else None
        text, plan = None, asked.plan
        if plan.made_on_text:
            text = _text_of_plan(plan, options, source, scratch, progress)
        if text is not None and plan.method.sequential:
            plan = _again(plan, source, text, progress)
    else:
        assert asked.request is not None
        apart = options.heldout is None
        documents, heldout = read_texts(options, source, progress, apart=apart, proves=proves(options))
        layout = _layout(options)
        text = _text(documents, layout, options, source, scratch) if documents else None
        whole = text is not None and reads_whole(asked.request.method)
        seen: Trace | CalibrationText | None = text
        cuts: dict[str, InputCut] = {}
        if text is not None and whole:
            seen, cuts = _whole(options, source, asked.request, text, loss, progress)
        made = plan_weights(source.checkpoint, seen, asked.request, progress)
        kept = str(layout["data"]) if options.data is not None and apart else ""
        told = {"kept_apart": kept, "text_sha256": text_hash(options.data)}
        plan = made.with_file(**told, cuts=cuts, calibrated=layout if text is not None else {})
    baselines = [] if heldout is None else _baselines(plan, source)
    if text is not None:
        made_before = plan.file.made
        plan, *baselines = make_layers(source.checkpoint, text, [plan, *baselines], progress)
        _warn_of_others(made_before, plan.file.made)
    further = {} if others is None or heldout is None else others(plan)
    plans = {
        name: plan_weights(source.checkpoint, text, request, progress)
        for name, request in further.items()
        if text is not None or not request.method.required
    }
    return Decided(plan, heldout, baselines, plans)


def _layout(options: InPlaceOptions) -> dict[str, Any]:
    """How the text was laid out, so that a stored plan can go through it again."""
    return {
        "data": None if options.data is None else named(options.data),
        "apart": options.heldout is None,
        "max_tokens": options.max_tokens,
        "seq_len": options.seq_len,
        "batch_size": options.batch_size,
        "bos": options.bos,
    }


def _text(
    documents: list[Document], layout: Mapping[str, Any], options: InPlaceOptions, source: OpenedModel, scratch: Path
) -> CalibrationText:
    tokenizer, length = source.tokenizer(), min(layout["seq_len"], source.longest)
    rows = calibration_rows(
        documents,
        tokenizer,
        seq_len=length,
        max_tokens=layout["max_tokens"],
        bos=layout["bos"],
        pictures=source.pictures(documents),
    )
    return CalibrationText(
        list(rows.batches(layout["batch_size"])),
        scratch / "calibration",
        named_dtype(options.dtype),
        options.device,
        tokenizer,
        origin(layout["data"], apart=layout["apart"]),
    )


def _text_of_plan(
    plan: WeightPlan, options: InPlaceOptions, source: OpenedModel, scratch: Path, progress: Progress | None
) -> CalibrationText:
    """The text that a stored plan was made on, laid out alike.

    Raises:
        BadConfig: the plan does not say which, or the text has changed.
        BadData: it is not there.
    """
    layout = plan.file.calibrated
    if not layout or not layout.get("data"):
        raise BadConfig(
            f"{plan.file.method} makes weights as a text passes by, and the plan names none",
            hint="make the plan again (--data TEXT)",
        )
    check_unchanged(layout["data"], plan.file.text_sha256, "make the plan again (--data TEXT)")
    documents = load_text(layout["data"], split="train" if layout["apart"] else None, progress=progress)
    return _text(documents, layout, options, source, scratch)


def _again(plan: WeightPlan, source: OpenedModel, text: CalibrationText, progress: Progress | None) -> WeightPlan:
    """The plan with its weights, made anew; a warning where they are not those that it was stored with."""
    request = PlanRequest(plan.method, plan.file.budget, seed=plan.file.seed, protected=plan.file.protected)
    made = plan_weights(source.checkpoint, text, request, progress)
    _warn_of_others(plan.file.made, made.file.made)
    return WeightPlan(plan.file.model_copy(update={"made": made.file.made}), made.statistics, made.made)


def _warn_of_others(before: Mapping[int, str], now: Mapping[int, str]) -> None:
    """Say where weights are not those that a plan was stored with."""
    changed = [layer for layer, digest in now.items() if before.get(layer, digest) != digest]
    if changed:
        logger.warning(
            "weights of %d of %d layers are not those that the plan was stored with, bit for bit: another machine, "
            "dtype or version rounds alike, but not in every last bit",
            len(changed),
            len(now),
        )


def _baselines(plan: WeightPlan, source: OpenedModel) -> list[WeightPlan]:
    """What the method's baselines decide on the same budget; none where that is the method itself.

    What they measure is part of what the method itself measured; one that needs more is left out.
    """
    found = []
    for b in plan.method.baselines:
        method = make_method(plan.file.kind, b.name, b.settings)
        known = all(name in statistics for name in method.required for statistics in plan.statistics.values())
        if b.name != plan.file.method and known:
            request = PlanRequest(method, plan.file.budget, seed=plan.file.seed)
            own = {layer: _only(statistics, method.required) for layer, statistics in plan.statistics.items()}
            inputs = inputs_of(source.checkpoint, request, source.geometries, own)
            made = plan_decided(source.checkpoint, inputs, request, own, None)
            # Beside routed experts the same is cut: the proof tells what the choice of their neurons is worth.
            found.append(made.with_file(cuts=plan.file.cuts))
    return found


def _only(statistics: LayerStatistics, names: Sequence[str]) -> LayerStatistics:
    return LayerStatistics(
        statistics.experts,
        statistics.hidden,
        statistics.domains,
        statistics.tokens,
        {name: statistics[name] for name in names},
        width=statistics.width,
    )


def _whole(
    options: InPlaceOptions,
    source: OpenedModel,
    request: PlanRequest,
    text: CalibrationText,
    loss: Callable[[], Loss] | None,
    progress: Progress | None,
) -> tuple[Trace, dict[str, InputCut]]:
    """What a method needs of a model that has to be in memory as a whole, and what stays beside routed experts."""
    asked = next_token_loss if loss is None else loss()
    if loss is not None and any(getattr(batch, "shown", None) is not None for batch in text.batches):
        raise BadConfig("the text shows pictures, which a teacher is not shown", hint="--set score=taylor")
    recording = Recording(
        statistics=("load", *request.method.required),
        keep_choices=False,
        tokenizer=text.tokenizer,
        source=text.source,
        seed=request.seed,
        fingerprint=source.checkpoint.fingerprint,
        loss=asked,
    )
    model = load_for_answers(source, options.device, options.dtype)
    trace = record(model, text.batches, recording, progress=progress)
    return trace, decided_cuts(source, request.method, model, text.batches, asked, progress)
