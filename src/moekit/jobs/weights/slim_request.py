"""What narrowing is asked for, of which model, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from moekit._progress import Progress
from moekit.checkpoint.precision import stored_dtype
from moekit.compress.budget.parents import expert_weights
from moekit.compress.budget.width import (
    WidthBudget,
    multiple_for,
    parse_bytes,
    parse_width,
    width_for,
    width_for_bytes,
)
from moekit.compress.engine.dense_cuts import InputCut
from moekit.compress.engine.layout import prepare
from moekit.compress.engine.narrowing import SlimMethod
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan, budget_as
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.rewriting import PlannedRewrite
from moekit.errors import BadConfig, UnsupportedModel
from moekit.jobs.options.slim import SlimOptions
from moekit.jobs.shared.opened import OpenedModel, open_source
from moekit.jobs.shared.teachers import refuse_other_tokenizer
from moekit.jobs.weights import inplace_request
from moekit.jobs.weights.dense_parts import sized_cuts
from moekit.jobs.weights.inplace_job import settings_told
from moekit.jobs.weights.inplace_request import Asked, any_outcomes, ask, mtp_of
from moekit.jobs.weights.self_calibration import load_for_answers
from moekit.jobs.weights.sizes import precision_of
from moekit.trace.loss import Loss, TeacherLoss

# What rows of grouped products of 16-bit numbers must be multiples of.
_ROW_BYTES = 16


def method_of(options: SlimOptions) -> SlimMethod:
    """The method that was asked for, with its settings."""
    return cast(SlimMethod, inplace_request.method_of(options))


def check_width(options: SlimOptions) -> None:
    """Refuse a width that no model can have.

    Raises:
        BadConfig: none is asked for, two are, or it is none.
    """
    if (options.width is None) == (options.max_bytes is None):
        given = "nothing says" if options.width is None else "width and bytes both say"
        raise BadConfig(f"{given} how wide experts become", hint="--width 1/2, --width 384, or --bytes 12GiB")
    if options.width is not None:
        parse_width(options.width)
    if options.max_bytes is not None:
        parse_bytes(options.max_bytes)


def width_before(source: OpenedModel) -> int:
    """Neurons of every expert.

    Raises:
        UnsupportedModel: layers differ in it.
    """
    widths = {layer: geometry.width for layer, geometry in source.geometries.items()}
    if len(set(widths.values())) > 1:
        raise UnsupportedModel(
            f"layers hold experts of {min(widths.values())} to {max(widths.values())} neurons",
            file=source.checkpoint.path,
            hint="drop experts instead (moekit prune)",
        )
    return next(iter(widths.values()))


def request_of(options: SlimOptions, source: OpenedModel, seed: int) -> PlanRequest:
    """What is asked for, as a number of neurons that this model's experts can have.

    Raises:
        BadConfig: wider than they are, no multiple, bytes that do not suffice, or rows that kernels do not take.
    """
    method, before = method_of(options), width_before(source)
    step = _whole_rows(source, before)
    multiple = max(multiple_for(before), step) if method.multiple is None else method.multiple
    if options.max_bytes is not None:
        limit = parse_bytes(options.max_bytes)
        cuts = sized_cuts(source, method)
        width = width_for_bytes(limit, before, multiple, lambda width: _bytes_at(source, width, cuts))
    else:
        assert options.width is not None
        width = width_for(options.width, before, multiple)
    if width % step:
        raise BadConfig(
            f"experts of {width} neurons have rows that are no whole {_ROW_BYTES} bytes, on which the grouped kernels "
            "that transformers takes by default break off",
            hint=f"ask for a multiple of {step} (--set multiple={step})",
        )
    return PlanRequest(method, WidthBudget(width=width), seed=seed)


def _whole_rows(source: OpenedModel, before: int) -> int:
    """Neurons by which widths must go so that rows of 16-bit weights stay whole for grouped kernels; 1 for others."""
    stored = stored_dtype(source.checkpoint.config, source.checkpoint.tensors)
    step = 1 if stored is None or stored.itemsize != 2 else _ROW_BYTES // stored.itemsize
    return step if before % step == 0 else 1


def asked_of(options: SlimOptions, seed: int, progress: Progress | None = None) -> Asked:
    """What is asked for, of the model opened; a teacher's memory is counted beside it. Raises: see `ask`."""
    asked = ask(options, request_of, seed, progress)
    if options.teacher is None:
        return asked
    teacher = open_source(str(options.teacher), progress)
    wide = precision_of(teacher, options)
    return replace(asked, memory=asked.memory + teacher.nbytes * wide.running // wide.stored)


def teacher_loss(options: SlimOptions, asked: Asked) -> Callable[[], Loss] | None:
    """What loads the teacher, and gives the loss that neurons are scored by; None where there is none.

    Raises:
        BadConfig: the teacher is the model itself, or knows other tokens.
    """
    if options.teacher is None:
        return None
    teacher, source = open_source(str(options.teacher)), asked.source
    if teacher.checkpoint.fingerprint == source.checkpoint.fingerprint:
        raise BadConfig(
            "the teacher is the model itself: its distance from itself has no gradient that neurons could be ranked by",
            file=teacher.checkpoint.path,
            hint="score the first stage by --set score=taylor, without a teacher",
        )
    refuse_other_tokenizer(source.tokenizer(), teacher.tokenizer(), str(options.teacher))
    return lambda: TeacherLoss(load_for_answers(teacher, options.device, options.dtype))


def _bytes_at(source: OpenedModel, width: int, cuts: Mapping[str, InputCut]) -> int:
    return _tensor_bytes(source, any_outcomes(source, WidthBudget(width=width)), cuts)


def _tensor_bytes(source: OpenedModel, outcomes: Mapping[int, LayerOutcome], cuts: Mapping[str, InputCut]) -> int:
    kept = prepare(source.checkpoint, outcomes, mtp=mtp_of(outcomes, cuts), cuts=cuts).kept
    return sum(tensor.spec.nbytes for tensor in kept)


def _beside(cuts: Mapping[str, InputCut]) -> dict[str, dict[str, int]]:
    """What is cut beside routed experts: parts of each layer before and after."""
    return {cut.kind: {"before": cut.parts, "after": len(cut.keep)} for cut in cuts.values()}


def summarizer(source: OpenedModel) -> Any:
    """What tells of a plan for this model: (plan, what carried it out) -> plain values."""
    before = width_before(source)
    weights = expert_weights(source.geometries)

    def summary(plan: WeightPlan, made: PlannedRewrite | None) -> dict[str, Any]:
        file = plan.file
        after = budget_as(WidthBudget, file.budget).width
        return {
            **settings_told(plan),
            "width": {"before": before, "after": after},
            "shared": not any(cut.kind == "shared" for cut in file.cuts.values())
            and any(geometry.shared_width for geometry in source.geometries.values()),
            "beside": _beside(file.cuts),
            "weights": {"before": weights, "after": weights * after // before},
            "bytes": {"before": source.nbytes, "after": _tensor_bytes(source, plan.outcomes, file.cuts)},
            "layers": [
                {
                    "layer": layer,
                    "experts": told.experts,
                    "width": told.outcome.width or told.width,
                    "never_routed": list(told.never_routed),
                    "figures": dict(told.outcome.figures) | ({} if made is None else made.figures.get(layer, {})),
                }
                for layer, told in file.layers.items()
            ],
        }

    return summary
