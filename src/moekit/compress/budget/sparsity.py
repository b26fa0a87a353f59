"""How sparse a model is: zeros counted, and what a second stage must still do after a first one."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig


class SparsityBudget(BaseModel):
    """How many weights become zero.

    Attributes:
        sparsity: share of zeros among the routed experts' weights that are there.
        total: share of `original` that is to be gone, with experts or as zeros; None where nobody asked for one.
        original: routed experts' weights of the checkpoint before any experts were removed; None where unknown.
        weights: routed experts' weights that are there; filled in as a plan is made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float
    total: float | None = Field(default=None, ge=0, lt=1)
    original: int | None = Field(default=None, ge=1)
    weights: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Count:
    """Weights of the experts' matrices, and how many of them are zero; counts of layers add up.

    Attributes:
        zeros: entries that are exactly zero.
        total: all entries.
    """

    zeros: int = 0
    total: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.zeros + other.zeros, self.total + other.total)

    @property
    def sparsity(self) -> float:
        """Share of zeros; 0 of nothing."""
        return self.zeros / self.total if self.total else 0.0

    def gone_of(self, original: int) -> float:
        """Share of `original` weights that are gone: removed with their experts, or zero.

        Args:
            original: how many weights there were before experts were removed.
        """
        return (original - self.total + self.zeros) / original


def count_zeros(weights: LayerWeights) -> Count:
    """Count the zeros of a layer's gate, up and down matrices; routers and biases are no part of it."""
    found = Count()
    for tensor in (weights.gate_EIH, weights.up_EIH, weights.down_EHI):
        if tensor is not None:
            # One expert at a time: the comparison makes a mask as large as what it looks at.
            found += Count(sum(int((matrix == 0).sum()) for matrix in tensor), tensor.numel())
    return found


def remaining_sparsity(total: float, removed: float, prunable: float | None = None) -> float:
    """Share of what is left that must become zero: s_u = (S_total - s_e) / (1 - s_e).

    All arguments are shares of the same base, such as all parameters of the model, or the weights of its experts.

    Args:
        total: S_total, share of the base that is to be gone after both stages, in [0, 1).
        removed: s_e, share that went with whole experts, in [0, 1).
        prunable: share that may hold zeros; all that is left by default. Where only experts are made sparse and the
            base is the whole model, this is the share of the experts that stay.

    Raises:
        BadConfig: the stages cannot meet the total; the message names the nearest total that they can.
    """
    prunable = 1.0 - removed if prunable is None else prunable
    for name, value in (("total sparsity", total), ("share removed", removed)):
        if not 0.0 <= value < 1.0:
            raise BadConfig(f"the {name} is {value}", hint="it is a share: at least 0 and below 1")
    if not 0.0 < prunable <= 1.0 - removed + 1e-12:
        raise BadConfig(
            f"the prunable share is {prunable}, after {removed:g} was removed",
            hint=f"it lies above 0 and is at most {1.0 - removed:g}",
        )
    rest = (total - removed) / prunable
    if rest < -1e-12:
        raise BadConfig(
            f"a total sparsity of {total:g} is less than what goes with the experts, {removed:g}",
            hint=f"remove fewer experts, or ask for a total of at least {removed:g}",
        )
    if rest >= 1.0:
        raise BadConfig(
            f"a total sparsity of {total:g} cannot be met: {removed:g} is removed and {prunable:g} may hold zeros",
            hint=f"ask for a total below {removed + prunable:g}, or remove more experts",
        )
    return max(rest, 0.0)


def total_sparsity(removed: float, sparsity: float) -> float:
    """Share of the base that is gone after both stages: the inverse of `remaining_sparsity`.

    Args:
        removed: s_e, share that went with whole experts.
        sparsity: s_u, share of zeros among what is left.
    """
    return removed + (1.0 - removed) * sparsity
