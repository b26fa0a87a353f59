"""What a method is that rounds the weights of experts to few bits.

A method says in `rounded` what becomes of one expert's matrices; how many bits each gets is shared by `allocate`. See
`WeightMethod` for what all kinds share. Weights are rounded and stay in the source's dtype: the folder loads anywhere,
computes what a packed form would, and is as large as before.

Routers, biases and whatever else a layer holds stay as they are.

Legend: E experts, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.compress.budget.bits import BitBudget, check_group, packed_bits
from moekit.compress.engine.carrying import FIELDS
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.method import Baseline, WeightMethod
from moekit.compress.engine.outcome import PARTS, LayerOutcome, Part, Widths
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig, MoekitError, NumericFault

BASELINE = "rtn"
Matrices = dict[Part, Tensor]


class QuantizeMethod(WeightMethod[BitBudget, Widths]):
    """Base of all methods that round weights to few bits; fields are the method's knobs."""

    rewrites: ClassVar[bool] = True

    group: int = Field(
        default=128, ge=0, description="inputs of a row that share a scale and a zero point; 0: the whole row"
    )
    symmetric: bool = Field(
        default=False,
        description="zero in the middle of every grid, as engines' packed experts want it (moekit export)",
    )

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[Self]:
        """Groups that divide, and whole rows, of symmetric grids too."""
        group = gcd(geometry.hidden, geometry.width)
        return [cls(group=group), cls(group=0), cls(group=group, symmetric=True)]

    @property
    def sequential(self) -> bool:
        """Whether a layer is measured on what the rounded layers before it give; so wherever activations are."""
        return bool(self.required)

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        """Plain rounding to the same bits in the same groups."""
        return (Baseline(BASELINE, {"group": self.group, "symmetric": self.symmetric}),)

    @abstractmethod
    def rounded(
        self, matrices: Mapping[Part, Tensor], bits: Mapping[Part, int], expert: int, inputs: LayerInputs
    ) -> Matrices:
        """One expert's matrices on their grids, in the dtype they have.

        Args:
            matrices: those to be rounded, finite, [R, C], rows are outputs; not to be changed.
            bits: of each.
            expert: whose.
            inputs: of the layer as it is now.
        """

    def figures(self, inputs: LayerInputs) -> dict[str, float | list[float]]:
        """What else is worth telling of a layer, by name."""
        return {}

    def allocate(
        self, inputs: Mapping[int, LayerInputs], scores: Mapping[int, Tensor], budget: BitBudget, sizes: Any
    ) -> dict[int, Widths]:
        """Bits of each part for each expert: those that the budget gives to all, or that were shared among them.

        Raises:
            BadConfig: groups that do not divide, or a part that this model's experts do not have.
        """
        found: dict[int, Widths] = {}
        for layer in inputs:
            geometry = inputs[layer].geometry
            parts = parts_of(geometry, budget, layer)
            check_group(self.group, {part: columns_of(part, geometry) for part in parts}, layer)
            shared = None if budget.widths is None else budget.widths[layer]
            found[layer] = {part: shared or (n,) * geometry.experts for part, n in parts.items()}
        return found

    def decide(self, inputs: LayerInputs, scores_E: Tensor, share: Widths) -> LayerOutcome:
        """All experts stay, with so many bits."""
        figures = self.figures(inputs) if self.required else {}
        return LayerOutcome(keep=tuple(range(inputs.experts)), bits=share, figures=figures)

    @torch.no_grad()
    def transform(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> LayerWeights:
        """The layer with its gate, up and down matrices rounded, expert by expert; a copy, the same elsewhere.

        Raises:
            BadConfig: statistics of another number of experts, or groups that do not divide.
            NumericFault: a weight is NaN or infinite; names layer and expert.
        """
        if weights.experts != inputs.experts:
            raise BadConfig(
                f"weights of {weights.experts} experts, statistics of {inputs.experts}",
                layer=inputs.layer,
                hint="measure the layer after its experts were changed",
            )
        stacks: Matrices = {
            part: stack for part in outcome.bits if (stack := getattr(weights, FIELDS[part])) is not None
        }
        check_group(self.group, {part: stack.shape[2] for part, stack in stacks.items()}, inputs.layer)
        made = {part: torch.empty_like(t, memory_format=torch.contiguous_format) for part, t in stacks.items()}
        for expert in range(weights.experts):
            matrices = {part: stack[expert] for part, stack in stacks.items()}
            _refuse_non_finite(matrices, inputs.layer, expert)
            try:
                rounded = self.rounded(matrices, {p: outcome.bits[p][expert] for p in matrices}, expert, inputs)
            except MoekitError as error:
                error.layer = inputs.layer if error.layer is None else error.layer
                error.expert = expert if error.expert is None else error.expert
                raise
            for part, matrix_RC in rounded.items():
                made[part][expert] = matrix_RC
        changed: dict[str, Any] = {FIELDS[part]: stack for part, stack in made.items()}
        return dataclasses.replace(weights, **changed)


def parts_of(geometry: Geometry, budget: BitBudget, layer: int | None = None) -> dict[Part, int]:
    """Bits of the parts that a layer's experts have. Where all three are given alike, a missing gate is no fault.

    Where a mean is shared, all parts of an expert get the same; told is the most that one may get.

    Raises:
        BadConfig: bits of a gate that is not there are asked for by name.
    """
    if budget.mean is not None:
        return {part: budget.choices[-1] for part in PARTS if part != "gate" or geometry.has_gate}
    if geometry.has_gate or "gate" not in budget.bits:
        return dict(budget.bits)
    rest: dict[Part, int] = {part: n for part, n in budget.bits.items() if part != "gate"}
    if set(rest.values()) != {budget.bits["gate"]}:
        raise BadConfig("bits are asked for gate projections, which these experts do not have", layer=layer)
    return rest


def columns_of(part: Part, geometry: Geometry) -> int:
    """Inputs of a part's matrices."""
    return geometry.width if part == "down" else geometry.hidden


def packed_bits_of(geometry: Geometry, bits: Mapping[Part, Sequence[int]], group: int, symmetric: bool = False) -> int:
    """Bits that the rounded matrices of a layer's experts take in a packed form, scales and zero points with them."""
    size = geometry.width * geometry.hidden
    return sum(
        packed_bits(size, n, group or columns_of(part, geometry), symmetric=symmetric)
        for part, widths in bits.items()
        for n in widths
    )


def _refuse_non_finite(matrices: Mapping[Part, Tensor], layer: int, expert: int) -> None:
    for part, matrix_RC in matrices.items():
        if not bool(matrix_RC.isfinite().all()):
            raise NumericFault(
                f"the {part} projection has weights that are not finite",
                layer=layer,
                expert=expert,
                hint="run moekit check on the model",
            )
