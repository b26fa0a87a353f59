"""Experts that stay make up for those that went: their down projections, refitted to what the layer gave as a whole.

With y_t what all routed experts of the layer gave a token together, and w_te, h_te gate weight and inner activations of
an expert that stays under the new routing, the matrices D_e minimise

    sum_t ||y_t - sum_e w_te D_e h_te||^2 + sum_e lam_e ||D_e - D0_e||^2

one after the other, each in closed form while the others stand still, a few times round. No step makes that sum larger,
so the layer's error on the text does not grow. lam_e is a share of the mean square of the expert's neurons.

Legend: E experts before, M experts after, N tokens of a batch, n tokens of one expert, H hidden, I expert width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moekit.compress.maths.least_squares import refit, usual_ridge
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault
from moekit.trace.batch import widest
from moekit.trace.expert_inputs import ExpertInputs


class BlockRepair(BaseModel):
    """How experts that stay make up for those that go.

    Attributes:
        use: the one way there is.
        ridge: pulls down projections to what they were, as a share of the mean square of a neuron; None for 0.0001 of
            experts with more than 20 tokens a neuron, else 0.01.
        sweeps: how often each expert is refitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    use: Literal["least-squares"] = "least-squares"
    ridge: float | None = Field(default=None, ge=0)
    sweeps: int = Field(default=3, ge=1)


@torch.no_grad()
def repaired(
    weights: LayerWeights,
    before: ExpertInputs,
    after: ExpertInputs,
    repair: BlockRepair,
    *,
    layer: int | None = None,
    weighs_inputs: bool = False,
) -> tuple[LayerWeights, dict[str, float]]:
    """The experts that stay with other down projections, and how far the layer is from what it gave.

    Args:
        weights: of the experts that stay, as `after` runs them.
        before: what the layer's experts are given as it was.
        after: what those that stay are given under the new routing.
        repair: how.
        layer: decoder layer, for messages.
        weighs_inputs: gate weights multiply what experts are given; what they give then holds them already.

    Returns:
        The weights in their dtypes; and the layer's error on the text by the norm of what it gave, "unrepaired" and
        "repaired".

    Raises:
        NumericFault: activations that are not finite; names layer and expert.
    """
    missing = _Missing(before, after, weights, weighs_inputs)
    whole, first = missing.whole or 1.0, missing.squared()
    dtype = widest(weights.down_EHI.device)
    down_MHI = weights.down_EHI.to(torch.promote_types(weights.down_EHI.dtype, torch.float32), copy=True)
    for _ in range(repair.sweeps):
        for expert in range(weights.experts):
            tokens, moment_II, cross_HI = missing.moments(expert, dtype)
            if not tokens:
                continue
            if not bool(moment_II.isfinite().all() and cross_HI.isfinite().all()):
                raise NumericFault(
                    "what it is given on the text is not finite",
                    layer=layer,
                    expert=expert,
                    hint="calibrate in a wider format (--dtype float32 or bfloat16), or see `moekit check`",
                )
            now_HI = down_MHI[expert].to(dtype)
            ridge = usual_ridge(tokens, weights.width) if repair.ridge is None else repair.ridge
            made_HI = refit(cross_HI + now_HI @ moment_II, moment_II, weights.down_EHI[expert].to(dtype), ridge)
            missing.fill(expert, made_HI - now_HI)
            down_MHI[expert] = made_HI.to(down_MHI)
    figures = {"unrepaired": (first / whole) ** 0.5, "repaired": (missing.squared() / whole) ** 0.5}
    return dataclasses.replace(weights, down_EHI=down_MHI.to(weights.down_EHI.dtype)), figures


class _Missing:
    """What a layer lacks at each token of the text: what its experts gave before, less what those that stay give.

    Attributes:
        whole: sum of squares of what the experts gave before.
    """

    def __init__(self, before: ExpertInputs, after: ExpertInputs, weights: LayerWeights, weighs_inputs: bool) -> None:
        self._after, self._weighs_inputs = after, weighs_inputs
        kind = torch.promote_types(weights.down_EHI.dtype, torch.float32)
        self._rest = [torch.zeros(n, weights.hidden, dtype=kind) for n in before.tokens]
        for expert in range(before.experts):
            self._add(before, expert, 1)
        self.whole = self.squared()
        for expert in range(weights.experts):
            self._add(after, expert, -1)

    def squared(self) -> float:
        """Sum of squares."""
        return sum(float(rest_NH.double().square().sum()) for rest_NH in self._rest)

    def moments(self, expert: int, dtype: torch.dtype) -> tuple[int, Tensor, Tensor]:
        """Tokens of an expert that stays, its sum of w^2 h h^T [I, I], and sum of w r h^T [H, I], r what is missing."""
        tokens, moment, cross = 0, Tensor(), Tensor()
        for number, token_n, batch in self._after.placed(expert):
            gated_nI = batch.inner_nI.to(dtype) * self._gate(batch.weights_n).to(dtype)[:, None]
            rest_nH = self._rest[number][token_n].to(gated_nI)
            if not tokens:
                moment = gated_nI.new_zeros(gated_nI.shape[1], gated_nI.shape[1])
                cross = gated_nI.new_zeros(rest_nH.shape[1], gated_nI.shape[1])
            moment += gated_nI.T @ gated_nI
            cross += rest_nH.T @ gated_nI
            tokens += len(token_n)
        return tokens, moment, cross

    def fill(self, expert: int, added_HI: Tensor) -> None:
        """An expert's down projection has changed by so much."""
        for number, token_n, batch in self._after.placed(expert):
            gated_nI = batch.inner_nI.to(added_HI) * self._gate(batch.weights_n).to(added_HI)[:, None]
            self._rest[number][token_n] -= (gated_nI @ added_HI.T).to(self._rest[number])

    def _gate(self, weight_n: Tensor) -> Tensor:
        return torch.ones_like(weight_n) if self._weighs_inputs else weight_n

    def _add(self, inputs: ExpertInputs, expert: int, sign: int) -> None:
        for number, token_n, batch in inputs.placed(expert):
            rest_NH = self._rest[number]
            given_nH = batch.outputs_nH.to(rest_NH.dtype) * self._gate(batch.weights_n).to(rest_NH.dtype)[:, None]
            rest_NH[token_n] += sign * given_nH.to(rest_NH)
