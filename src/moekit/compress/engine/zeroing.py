"""What a method is that zeroes single weights of the experts.

`zeroed` says for one matrix of one expert which entries go; a method that changes the surviving weights too overrides
`zeros`. `share` shares a sparsity among the layers. See `WeightMethod` for what all kinds share.

Routers, biases and whatever else a layer holds stay as they are.

Legend: E experts, H hidden, I expert width, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from moekit.compress.budget.sparsity import SparsityBudget
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.method import Baseline, WeightMethod
from moekit.compress.engine.outcome import LayerOutcome, Part
from moekit.compress.maths.masks import groups_of
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig, MoekitError, NumericFault

FIELDS: dict[Part, str] = {"gate": "gate_EIH", "up": "up_EIH", "down": "down_EHI"}
BASELINE = "magnitude"


class SparsifyMethod(WeightMethod[SparsityBudget, float]):
    """Base of all methods that zero single weights; fields are the method's knobs."""

    rewrites: ClassVar[bool] = True

    @property
    def sequential(self) -> bool:
        """Whether a layer is measured on what the sparse layers before it give; so wherever activations are."""
        return bool(self.required)

    @property
    def fixed_sparsity(self) -> float | None:
        """The one sparsity the knobs allow (.5 of 2:4); None where any will do."""
        return None

    @property
    def shares_by_measure(self) -> bool:
        """Whether `share` looks at what was measured."""
        return type(self).share is not SparsifyMethod.share

    def unseen(self, experts: Sequence[int], outcome: LayerOutcome) -> str:
        """That nothing was measured of them."""
        return ": nothing says which of their weights matter"

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        """Magnitudes at the same sparsity, in the same pattern."""
        pattern = None if self.fixed_sparsity is None else getattr(self, "pattern", None)
        return (Baseline(BASELINE, {} if pattern is None else {"pattern": pattern}),)

    @abstractmethod
    def zeroed(self, matrix_RC: Tensor, part: Part, expert: int, inputs: LayerInputs, sparsity: float) -> Tensor:
        """Where one matrix becomes zero.

        Args:
            matrix_RC: finite weights, rows are outputs; not to be changed.
            part: which of the expert's matrices.
            expert: whose.
            inputs: of the layer as it is now.
            sparsity: share of zeros.

        Returns:
            A mask [R, C], True where the weight goes.
        """

    def figures(self, inputs: LayerInputs) -> dict[str, float | list[float]]:
        """What else is worth telling of a layer, by name."""
        return {}

    def decide(self, inputs: LayerInputs, scores_E: Tensor, share: float) -> LayerOutcome:
        """All experts stay, with a share of zeros."""
        figures = self.figures(inputs) if self.required else {}
        return LayerOutcome(keep=tuple(range(inputs.experts)), sparsity=share, figures=figures)

    def transform(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> LayerWeights:
        """The layer with its zeros; see `zeros`."""
        return self.zeros(weights, inputs, outcome.sparsity or 0.0)

    def zeros(self, weights: LayerWeights, inputs: LayerInputs, sparsity: float) -> LayerWeights:
        """The layer with zeros in its gate, up and down matrices; a copy, bit for bit the same elsewhere.

        Args:
            weights: of the layer as it is now.
            inputs: statistics of the same experts in the same order.
            sparsity: share of zeros, in [0, 1).

        Raises:
            BadConfig: an impossible sparsity, or a pattern that does not fit the matrices.
            NumericFault: a weight is NaN or infinite; names layer and expert.
        """
        check_sparsity(sparsity, self.fixed_sparsity, inputs.layer)
        if weights.experts != inputs.experts:
            raise BadConfig(
                f"weights of {weights.experts} experts, statistics of {inputs.experts}",
                layer=inputs.layer,
                hint="measure the layer after its experts were pruned",
            )
        return map_matrices(
            weights,
            lambda matrix, part, expert: matrix.masked_fill(self.zeroed(matrix, part, expert, inputs, sparsity), 0),
            inputs.layer,
        )

    def allocate(
        self, inputs: Mapping[int, LayerInputs], scores: Mapping[int, Tensor], budget: SparsityBudget, sizes: Any
    ) -> dict[int, float]:
        """Sparsity of each layer, as `share` says.

        Raises:
            BadConfig: an impossible sparsity, or a layer that gets none.
        """
        shares = self.share(inputs, budget.sparsity)
        for layer in inputs:
            if layer not in shares:
                raise BadConfig("the method gave this layer no sparsity", layer=layer, hint="name all layers")
            check_sparsity(shares[layer], layer=layer)
        return {layer: shares[layer] for layer in inputs}

    def share(self, inputs: Mapping[int, LayerInputs], sparsity: float) -> dict[int, float]:
        """Share a sparsity among the layers: by default all have the same.

        Args:
            inputs: of each layer of the model as it was calibrated, nothing zeroed yet.
            sparsity: share of zeros in all layers together.

        Raises:
            BadConfig: an impossible sparsity; names the one that the knobs allow.
        """
        check_sparsity(sparsity, self.fixed_sparsity)
        return dict.fromkeys(inputs, sparsity)


def check_sparsity(sparsity: float, fixed: float | None = None, layer: int | None = None) -> None:
    """Refuse what is no share, or not the one that a pattern fixes.

    Raises:
        BadConfig: says what is allowed.
    """
    if not 0.0 <= sparsity < 1.0:
        raise BadConfig(f"the sparsity is {sparsity}", layer=layer, hint="it is a share: at least 0 and below 1")
    if fixed is not None and abs(sparsity - fixed) > 1e-6:
        raise BadConfig(
            f"the sparsity is {sparsity:g}, but the pattern zeroes exactly {fixed:g}",
            layer=layer,
            hint=f"ask for {fixed:g}, or for --set pattern=unstructured",
        )


def sparsity_of(pattern: str) -> float | None:
    """Share of zeros of a pattern; None for "unstructured"."""
    groups = groups_of(pattern)
    return None if groups is None else groups[0] / groups[1]


def valid_pattern(pattern: str) -> str:
    """For pydantic: the pattern, if it is one."""
    try:
        groups_of(pattern)
    except BadConfig as error:
        raise ValueError(str(error)) from error
    return pattern


@torch.no_grad()
def map_matrices(
    weights: LayerWeights, change: Callable[[Tensor, Part, int], Tensor], layer: int | None = None
) -> LayerWeights:
    """Apply (matrix, part, expert) -> matrix to all experts' matrices, one at a time; returns a copy.

    Raises:
        NumericFault: a weight is NaN or infinite; names layer and expert.
    """
    changed: dict[str, Any] = {}
    for part, name in FIELDS.items():
        stacked: Tensor | None = getattr(weights, name)
        if stacked is None:
            continue
        result = torch.empty_like(stacked, memory_format=torch.contiguous_format)
        for expert, matrix_RC in enumerate(stacked):
            if not bool(matrix_RC.isfinite().all()):
                raise NumericFault(
                    f"the {part} projection has weights that are not finite",
                    layer=layer,
                    expert=expert,
                    hint="run moekit check on the model",
                )
            try:
                result[expert] = change(matrix_RC, part, expert)
            except MoekitError as error:
                error.layer = layer if error.layer is None else error.layer
                raise
        changed[name] = result
    return dataclasses.replace(weights, **changed)
