"""The parts that take the experts' place before training, as `moekit train` is told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit import catalogue
from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint import fingerprint_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.errors import BadConfig
from moekit.experts.methods.factored import Factored
from moekit.jobs.weights.plans import plan_path
from moekit.runtime.attachment import attach
from moekit.runtime.experts import ExpertsPart

if TYPE_CHECKING:
    from moekit.jobs.options.train import TrainOptions


def experts_part(options: TrainOptions) -> ExpertsPart | None:
    """The part that is to take the experts' place; None where none is.

    Raises:
        BadConfig: no such part, or a setting that it does not have.
    """
    if options.experts is None:
        return None
    knobs = dict(options.experts)
    name = knobs.pop("use", None)
    if not isinstance(name, str):
        raise BadConfig("the experts' part has no name", hint="experts: {use: factored, rank: 32}")
    made: ExpertsPart = catalogue.make("experts", name, knobs)
    return made


def check_experts(options: TrainOptions) -> None:
    """Refuse parts that cannot be attached.

    Raises:
        BadConfig: see `experts_part`; ranks that share the experts; or a plan of bases that nothing shares.
    """
    part = experts_part(options)
    if part is not None and options.ep > 1:
        raise BadConfig(
            "what takes the experts' place reads or learns more than a rank holds", hint="leave out --ep, or --experts"
        )
    if options.basis_plan is not None and not isinstance(part, Factored):
        raise BadConfig(
            "basis_plan says which experts share a basis, but they are not factored",
            hint="add --experts '{use: factored, rank: 32}'",
        )


def attach_experts(options: TrainOptions, model: Any, *, seed: int) -> None:
    """Attach the part, if one is asked for.

    Args:
        options: of the job.
        model: stock, or with other parts.
        seed: of what the part draws.

    Raises:
        BadConfig: the part does not fit a layer, or stands there already; or the plan is of another model.
        BadData: no such plan, or not of a merge.
    """
    part = experts_part(options)
    if part is None:
        return
    constants = None
    if options.basis_plan is not None:
        plan = WeightPlan.load(plan_path(options.basis_plan), "merge")
        plan.check_model(fingerprint_model(model), options.model)
        counts = {layer.index: layer.geometry.experts for layer in find_moe_layers(model)}
        constants = {layer: {"basis": bases_of(plan.outcomes[layer], experts)} for layer, experts in counts.items()}
    attach(model, part, constants, seed=seed)


def bases_of(outcome: LayerOutcome, experts: int) -> Tensor:
    """For each expert the number of its group, [E]; an expert in no group has one of its own."""
    groups = [list(group) for group in outcome.sources or [(kept,) for kept in outcome.keep]]
    known = {expert for group in groups for expert in group}
    groups += [[expert] for expert in range(experts) if expert not in known]
    basis_E = torch.zeros(experts, dtype=torch.int32)
    for number, group in enumerate(groups):
        basis_E[group] = number
    return basis_E
