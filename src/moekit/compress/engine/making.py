"""New weights that are made as a text passes through the model as it is, of what each layer's experts are given.

Second moments of all layers are larger than the model. So plans are decided first, by little numbers; then the text
goes through the model once more, layer by layer from disk, and where it stands at a layer, the new layer of every plan
is made of the moments there, and kept. The text goes on through the layer as it was.

Legend: E experts, I expert width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from moekit._progress import Progress
from moekit.anatomy.probe import MoELayer
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.made_layers import MadeLayers
from moekit.compress.engine.measuring import as_stored, refuse_damaged
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.repairing import repaired
from moekit.compress.engine.request import CalibrationText
from moekit.compress.engine.resize import read_block, resized_block, resized_config
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Streamed

# Moments of one layer are remembered up to so many bytes: each plan, and its figures, ask for them again.
REMEMBERED = 2 << 30


def make_layers(
    checkpoint: Checkpoint, text: CalibrationText, plans: Sequence[WeightPlan], progress: Progress | None = None
) -> list[WeightPlan]:
    """The same plans with their new layers, those of all plans made in one pass of the text.

    Args:
        checkpoint: the model that they were made for.
        text: whose tokens the layers are made by.
        plans: decided; those whose weights can be made without a text come back as they are.
        progress: told layer by layer.

    Raises:
        BadConfig: a plan of another model, or one that redirects tokens and is to be repaired.
        NumericFault: weights or moments that are not finite; names layer and expert.
        UnsupportedModel: this family's experts do not follow the plain formula.
    """
    asked = [plan for plan in plans if plan.made_on_text and plan.made is None]
    if not asked:
        return list(plans)
    for plan in asked:
        plan.check_model(checkpoint.fingerprint, checkpoint.path)
    key = hashlib.sha256("".join(plan.hash for plan in asked).encode()).hexdigest()[:16]
    folder = None if text.folder is None else text.folder / f"making-{key}"
    kept = [MadeLayers(None if folder is None else folder / f"made-{number}") for number in range(len(asked))]
    with Streamed(
        checkpoint,
        text.batches,
        statistics=("load",),
        folder=folder,
        dtype=text.dtype,
        device=text.device,
        keep_inputs=True,
    ) as streamed:
        streamed.run(progress, partial(_make, checkpoint, streamed, asked, kept))
    made = dict(zip(map(id, asked), map(_with_layers, asked, kept), strict=True))
    return [made.get(id(plan), plan) for plan in plans]


def _with_layers(plan: WeightPlan, kept: MadeLayers) -> WeightPlan:
    changed = [n for n, told in plan.file.layers.items() if not told.outcome.unchanged(told.experts)]
    file = plan.file.model_copy(update={"made": kept.digests(changed)})
    return WeightPlan(file, plan.statistics, kept)


def _make(
    checkpoint: Checkpoint,
    streamed: Streamed,
    plans: Sequence[WeightPlan],
    kept: Sequence[MadeLayers],
    moe: MoELayer,
    statistics: LayerStatistics,
) -> None:
    """Make the layer where the text stands, for each plan."""
    refuse_damaged(moe, statistics)
    assert streamed.inputs is not None
    weights = as_stored(checkpoint, streamed.loader, moe.index, read_block(moe, streamed.loader.model.config))
    gated = remembering(streamed.inputs.gated_moment)
    for plan, made in zip(plans, kept, strict=True):
        outcome = plan.outcomes[moe.index]
        if outcome.unchanged(moe.geometry.experts):
            continue
        inputs = LayerInputs(
            moe.index,
            moe.geometry,
            _with_load(plan.statistics[moe.index], statistics),
            lambda: weights,
            plan.file.seed,
            frozenset(plan.file.protected.get(moe.index, ())),
            streamed.inputs.moments,
            gated,
        )
        new, figures = plan.method.transform(weights, outcome, inputs), plan.method.told(weights, outcome, inputs)
        if plan.file.repair is not None:
            new, told = _repaired(streamed, moe, new, outcome, plan)
            figures |= told
        made.put(moe.index, new, figures)


def _repaired(
    streamed: Streamed, moe: MoELayer, new: LayerWeights, outcome: LayerOutcome, plan: WeightPlan
) -> tuple[LayerWeights, dict[str, float]]:
    """Experts that stay, refitted to what the layer gave, on the choices that tokens make among them."""
    assert plan.file.repair is not None
    assert streamed.inputs is not None
    if outcome.redirect is not None:
        raise BadConfig(
            f"{plan.file.method} sends tokens of experts that are gone elsewhere, which a repair does not follow",
            layer=moe.index,
            hint="leave the repair out",
        )
    config, file = streamed.loader.model.config, plan.file
    sized = resized_config(config, new.experts, top_k=file.top_k, groups=file.groups, width=outcome.width)
    running = new.map(lambda t: t.to(streamed.loader.dtype), router=False)
    block = resized_block(moe, sized, running, outcome)
    with streamed.inputs_of(moe, block) as after:
        return repaired(
            new,
            streamed.inputs,
            after,
            plan.file.repair,
            layer=moe.index,
            weighs_inputs=moe.geometry.weighs_inputs,
        )


def remembering(read: Callable[[int], Tensor], limit: int = REMEMBERED) -> Callable[[int], Tensor]:
    """The same, with what was read kept up to so many bytes."""
    known: dict[int, Tensor] = {}

    def moment(expert: int) -> Tensor:
        if expert in known:
            return known[expert]
        found = read(expert)
        if sum(t.nbytes for t in known.values()) + found.nbytes <= limit:
            known[expert] = found
        return found

    return moment


def _with_load(decided: LayerStatistics, seen: LayerStatistics) -> LayerStatistics:
    """What the plan was decided by, and how many tokens of this text chose each expert."""
    values = {**decided, "load": seen["load"]}
    return LayerStatistics(seen.experts, seen.hidden, seen.domains, seen.tokens, values, width=seen.width)
