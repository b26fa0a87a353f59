"""NAEE: search for the experts whose removal changes a layer's output least (ACL 2024, arXiv:2402.14800).

The loss of a subset is the distance of the block's output from the full block's, when only that subset may be chosen:
the sum over batches of the Frobenius norm (not squared).

Legend: E experts, M experts kept.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence, Set as AbstractSet
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod, Reconstruction
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import BadConfig, NumericFault

Loss = Callable[[tuple[int, ...]], float]
# Beyond this many runs of a layer nobody waits for an exhaustive search.
LIMIT_SUBSETS = 1_000_000


def best_subset(loss: Loss, experts: int, keep: int, fixed: AbstractSet[int] = frozenset()) -> tuple[int, ...]:
    """Try every subset: the `keep` experts of the smallest loss, ascending.

    Args:
        loss: of keeping some experts, given ascending.
        experts: E.
        keep: M.
        fixed: experts that must stay.

    Returns:
        Of equal losses the subset that comes first in the order of numbers, so that lower numbers stay.
    """
    free = [e for e in range(experts) if e not in fixed]
    subsets = (tuple(sorted((*fixed, *some))) for some in itertools.combinations(free, keep - len(fixed)))
    return min(subsets, key=loss)


def greedy_subset(loss: Loss, experts: int, keep: int, fixed: AbstractSet[int] = frozenset()) -> tuple[int, ...]:
    """Remove the expert whose removal raises the loss least, again and again, until `keep` stay.

    Arguments and result are those of `best_subset`; of equal losses the higher number goes.
    """
    kept = tuple(range(experts))
    while len(kept) > keep:
        going = [e for e in reversed(kept) if e not in fixed]
        kept = min((tuple(k for k in kept if k != e) for e in going), key=loss)
    return kept


def rises(loss: Loss, experts: int) -> list[float]:
    """How much the loss rises when an expert alone is removed, by expert; 0 where it is the only one."""
    everyone = tuple(range(experts))
    if experts == 1:
        return [0.0]
    return [loss(everyone[:e] + everyone[e + 1 :]) - loss(everyone) for e in everyone]


@register(
    name="naee",
    kind="prune",
    paper="arXiv:2402.14800",
    changes="weights",
    limits=(
        "Runs each layer once for every subset tried: E choose M by exhaustive search, about E x (E - M) by greedy.",
        "Its scores (rises on removing one expert alone) say nothing about removing several together.",
    ),
)
class NAEE(PruneMethod):
    """Keep the subset of experts whose layer output is closest to the full layer's on the calibration text.

    Minimises L(S) = sum over batches of ||Z - Z_S||_F, Z the block's output with all experts, Z_S with only those of S
    (logits of the others at -inf before softmax and top-k). Exhaustive search finds the best S of M experts; greedy
    removes one expert at a time. `layerwise` decides every layer on the dense model's inputs; `progressive` on what the
    pruned layers before it give, against the dense model's outputs. Choose it on models with few experts, where its
    cost is bearable.
    """

    searches: ClassVar[bool] = True

    strategy: Literal["auto", "exhaustive", "greedy"] = Field(
        default="auto", description="how to search; auto is exhaustive up to most_subsets, greedy beyond"
    )
    mode: Literal["layerwise", "progressive"] = Field(
        default="layerwise", description="inputs of a layer: the dense model's, or those behind the pruned layers"
    )
    most_subsets: int = Field(default=500, ge=1, description="subsets a layer that auto still tries one by one")

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[PruneMethod]:
        """Both modes and both ways to search."""
        return [cls(strategy="greedy"), cls(mode="progressive", strategy="greedy"), cls()]

    @property
    def sequential(self) -> bool:
        """Progressive mode decides layer after layer."""
        return self.mode == "progressive"

    def score(self, inputs: LayerInputs) -> Tensor:
        """Not from statistics: `search` leaves the rises of the loss among the outcome's figures.

        Raises:
            BadConfig: always.
        """
        raise BadConfig(
            "naee has no scores without its search: it needs the model's blocks, not only statistics",
            layer=inputs.layer,
            hint="run its search; the outcome's figures then hold each expert's \"rise\"",
        )

    def search(self, inputs: LayerInputs, block: Reconstruction, keep: int) -> LayerOutcome:
        """The kept experts, with `loss`, `rise` (of removing each expert alone) and `evaluations` as figures.

        Raises:
            BadConfig: more experts are protected than may stay, or far too many subsets for an exhaustive search.
            NumericFault: a loss is NaN or infinite.
        """
        experts, fixed = inputs.experts, inputs.protected
        if len(fixed) > keep:
            raise BadConfig(
                f"{len(fixed)} experts are protected, but only {keep} may stay",
                layer=inputs.layer,
                hint=f"keep at least {len(fixed)}, or protect fewer",
            )

        @functools.cache
        def loss(kept: tuple[int, ...]) -> float:
            value = float(block.loss(kept))
            if not math.isfinite(value):
                raise _fault(inputs, value)
            return value

        exhaustive = self._exhaustive(math.comb(experts - len(fixed), keep - len(fixed)), inputs.layer)
        # With all of them there is nothing to choose, and a token may need as many.
        rise = rises(loss, experts) if keep < experts else [0.0] * experts
        kept = (best_subset if exhaustive else greedy_subset)(loss, experts, keep, fixed)
        figures: dict[str, float | list[float]] = {"loss": loss(kept), "rise": rise}
        return LayerOutcome(keep=kept, figures=figures | {"evaluations": float(loss.cache_info().misses)})

    def _exhaustive(self, subsets: int, layer: int) -> bool:
        if self.strategy != "exhaustive":
            return self.strategy == "auto" and subsets <= self.most_subsets
        if subsets > LIMIT_SUBSETS:
            raise BadConfig(
                f"an exhaustive search would run this layer {subsets:.2g} times",
                layer=layer,
                hint="say --set strategy=greedy, or drop fewer experts",
            )
        return True


def _damaged(tensors: Sequence[Tensor]) -> bool:
    return any(not bool(torch.isfinite(t).all()) for t in tensors)


def _fault(inputs: LayerInputs, value: float) -> NumericFault:
    """The error for a loss that is no number; names the expert where the weights can be looked at."""
    expert = None
    if inputs.read_weights is not None:
        weights = inputs.weights
        expert = next((e for e in range(weights.experts) if _damaged(weights.expert(e))), None)
    return NumericFault(
        f"the loss of the layer's output is {value}",
        layer=inputs.layer,
        expert=expert,
        hint="weights or activations are damaged (see `moekit check`)",
    )
