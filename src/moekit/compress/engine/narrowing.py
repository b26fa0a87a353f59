"""What a method is that makes the experts of a layer narrower.

A method says in `neuron_scores` how much each neuron of each expert counts; what all share is here: one width for all
experts, which neurons stay, and the repair of the down projections. Neurons that stay keep their order, each expert has
its own. See `WeightMethod` for what all kinds share.

Routers, shared experts and whatever else a layer holds stay as they are.

Legend: E experts, I expert width, J neurons that stay, H hidden.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import Trait
from moekit.compress.budget.width import WidthBudget
from moekit.compress.engine.carrying import FIELDS
from moekit.compress.engine.dense_cuts import Kind
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.method import Baseline, WeightMethod
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.least_squares import narrowed, squared_error, usual_ridge
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.trace.batch import widest


class SlimMethod(WeightMethod[WidthBudget, int]):
    """Base of all methods that narrow experts; fields are the method's knobs."""

    rewrites: ClassVar[bool] = True
    reads_moments: ClassVar[bool] = True

    multiple: int | None = Field(
        default=None, ge=1, description="widths are multiples of this; 64 by default, less where experts are tiny"
    )
    repair: Literal["none", "least-squares"] = Field(
        default="least-squares",
        description="put what the lost neurons gave on those that stay, as far as the text says how (down projections)",
    )
    ridge: float | None = Field(
        default=None,
        ge=0,
        description="pulls repaired weights to what they were, as a share of the mean square of a neuron; 0.0001 for "
        "experts with more than 20 tokens a neuron, else 0.01",
    )

    @classmethod
    def implied_traits(cls) -> frozenset[Trait]:
        """Narrows, and what all weight methods imply."""
        return super().implied_traits() | {"narrows"}

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[Self]:
        """With and without repair."""
        return [cls(), cls(repair="none")]

    @property
    def scored_by(self) -> tuple[str, ...]:
        """Statistics that the scores are made of."""
        return ()

    @property
    def made_on_text(self) -> bool:
        """Where down projections are repaired: by the second moments of one layer after the other."""
        return self.repair == "least-squares"

    @property
    def asks_teacher(self) -> bool:
        """Whether gradients are those of the distance from a teacher, not of the text's own loss."""
        return False

    @property
    def kept_parts(self) -> Mapping[Kind, int | float | str]:
        """What is kept outside of routed experts, as a number or a share; of kinds that are not named all."""
        return {}

    @property
    def required(self) -> tuple[str, ...]:
        """What is measured for the scores, and which experts any token chose."""
        return ("load", *self.scored_by) if self.scored_by or self.made_on_text else ()

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        """Neurons chosen by the size of their weights and at random, repaired alike."""
        alike = {"multiple": self.multiple, "repair": self.repair, "ridge": self.ridge}
        return (Baseline("magnitude", alike), Baseline("random", alike))

    def unseen(self, experts: Sequence[int], outcome: LayerOutcome) -> str:
        """That nothing was measured of them, and which they are."""
        return f": neurons ranked by the size of their weights, not repaired: {', '.join(map(str, experts))}"

    @abstractmethod
    def neuron_scores(self, weights: LayerWeights, inputs: LayerInputs) -> Tensor:
        """How much each neuron counts among those of its expert, [E, I]; more is better.

        Args:
            weights: of all experts.
            inputs: of the layer; rows of experts that no token chose are not looked at.
        """

    def allocate(
        self, inputs: Mapping[int, LayerInputs], scores: Mapping[int, Tensor], budget: WidthBudget, sizes: Any
    ) -> dict[int, int]:
        """The same width in every layer, since a config knows one.

        Raises:
            BadConfig: wider than the experts of a layer are.
        """
        for layer in inputs:
            before = inputs[layer].geometry.width
            if budget.width > before:
                raise BadConfig(
                    f"experts of {before} neurons cannot become {budget.width} wide",
                    layer=layer,
                    hint=f"ask for {before} at most",
                )
        return dict.fromkeys(inputs, budget.width)

    def decide(self, inputs: LayerInputs, scores_E: Tensor, share: int) -> LayerOutcome:
        """All experts stay, each with so many neurons."""
        width = None if share == inputs.geometry.width else share
        return LayerOutcome(keep=tuple(range(inputs.experts)), width=width)

    def kept(self, weights: LayerWeights, width: int, inputs: LayerInputs) -> Tensor:
        """Neurons that stay of each expert, ascending, [E, J]; of equal scores the first stays.

        Raises:
            NumericFault: a score is not finite; names layer and expert.
        """
        scores_EI = self.neuron_scores(weights, inputs).double().cpu()
        if self.scored_by:
            unseen = inputs.statistics.never_routed
            scores_EI = scores_EI.clone()
            scores_EI[unseen] = neuron_sizes(weights)[unseen].double().cpu()
        bad_E = ~scores_EI.isfinite().all(1)
        if bool(bad_E.any()):
            raise NumericFault(
                "scores of its neurons are NaN or infinite",
                layer=inputs.layer,
                expert=int(bad_E.long().argmax()),
                hint="look at the weights: `moekit check`",
            )
        order_EI = scores_EI.argsort(dim=1, descending=True, stable=True)
        return order_EI[:, :width].sort(dim=1).values

    @torch.no_grad()
    def transform(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> LayerWeights:
        """The layer with narrower experts; a copy.

        Raises:
            BadConfig: statistics of other experts.
            NumericFault: a score or a moment is not finite; names layer and expert.
            UnsupportedModel: experts hold something else for each neuron.
        """
        if (weights.experts, weights.width) != (inputs.experts, inputs.geometry.width):
            raise BadConfig(
                f"weights of {weights.experts} experts of {weights.width} neurons, statistics of {inputs.experts} of "
                f"{inputs.geometry.width}",
                layer=inputs.layer,
                hint="measure the layer as it is now",
            )
        kept_EJ = self.kept(weights, outcome.width or weights.width, inputs)
        made = select_neurons(weights, kept_EJ, inputs.layer)
        if self.repair == "none" or kept_EJ.shape[1] == weights.width:
            return made
        down_EHJ = torch.stack([self._repaired(weights, e, kept_EJ[e], inputs) for e in range(weights.experts)])
        return dataclasses.replace(made, down_EHI=down_EHJ)

    def _repaired(self, weights: LayerWeights, expert: int, kept_J: Tensor, inputs: LayerInputs) -> Tensor:
        """One expert's down projection, in the dtype it has."""
        down_HI = weights.down_EHI[expert]
        kept_J = kept_J.to(down_HI.device)
        tokens = int(inputs.statistics["load"][expert])
        if not tokens:
            return down_HI[:, kept_J]
        ridge = usual_ridge(tokens, len(kept_J)) if self.ridge is None else self.ridge
        made_HJ = narrowed(down_HI, _moment(inputs, expert, down_HI.device), kept_J, ridge)
        return made_HJ.to(down_HI.dtype)

    @torch.no_grad()
    def told(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> dict[str, float]:
        """How far the experts' gated outputs are from what they were on the text, without the repair and with it.

        Both relative to the norm of the outputs; nothing where no moments were measured.
        """
        if self.repair == "none" or outcome.width is None:
            return {}
        kept_EJ, totals = self.kept(weights, outcome.width, inputs), [0.0, 0.0, 0.0]
        none_J = torch.zeros(0, dtype=torch.int64)
        for expert, kept_J in enumerate(kept_EJ):
            down_HI = weights.down_EHI[expert]
            moment_II = _moment(inputs, expert, down_HI.device)
            made_HJ = self._repaired(weights, expert, kept_J, inputs)
            cases = ((none_J, down_HI[:, :0]), (kept_J, down_HI[:, kept_J.to(down_HI.device)]), (kept_J, made_HJ))
            for number, (left_J, new_HJ) in enumerate(cases):
                totals[number] += squared_error(down_HI, moment_II, left_J.to(down_HI.device), new_HJ)
        whole = totals[0] or 1.0
        return {"unrepaired": (totals[1] / whole) ** 0.5, "repaired": (totals[2] / whole) ** 0.5}


def neuron_sizes(weights: LayerWeights) -> Tensor:
    """|W_up[k, :]| * |W_down[:, k]|, [E, I]: a factor moved from one of the two to the other changes nothing."""
    up_EI: Tensor = torch.linalg.vector_norm(weights.up_EIH.float(), dim=2)
    down_EI: Tensor = torch.linalg.vector_norm(weights.down_EHI.float(), dim=1)
    return up_EI * down_EI


def select_neurons(weights: LayerWeights, kept_EJ: Tensor, layer: int | None = None) -> LayerWeights:
    """Experts with some of their neurons, each with its own; a copy.

    Args:
        weights: of a layer.
        kept_EJ: neurons of each expert, in the order that they are to have.
        layer: decoder layer, for messages.

    Raises:
        UnsupportedModel: experts hold something else for each neuron.
    """
    for name, tensor in weights.others.items():
        if weights.width in tensor.shape[1:]:
            raise UnsupportedModel(
                f"experts hold {name} {list(tensor.shape)}, and nothing says which of it belongs to which neuron",
                layer=layer,
                hint="drop experts instead (moekit prune)",
            )
    index_EJ = kept_EJ.to(weights.up_EIH.device)

    def taken(tensor: Tensor | None, axis: int) -> Tensor | None:
        if tensor is None:
            return None
        shape = [len(index_EJ), *(1 for _ in tensor.shape[1:])]
        shape[axis] = index_EJ.shape[1]
        sizes = [*tensor.shape]
        sizes[axis] = index_EJ.shape[1]
        return tensor.gather(axis, index_EJ.view(shape).expand(sizes))

    axes = {name: 2 if name == FIELDS["down"] else 1 for name in (*FIELDS.values(), "up_bias_EI", "gate_bias_EI")}
    changed: dict[str, Any] = {name: taken(getattr(weights, name), axis) for name, axis in axes.items()}
    return dataclasses.replace(weights, **changed)


def _moment(inputs: LayerInputs, expert: int, device: torch.device) -> Tensor:
    moment_II = inputs.gated_moment(expert).to(device, widest(device))
    if not bool(moment_II.isfinite().all()):
        raise NumericFault(
            "the second moment of its neurons is not finite",
            layer=inputs.layer,
            expert=expert,
            hint="calibrate in a wider format (--dtype float32 or bfloat16), or see `moekit check`",
        )
    return moment_II
