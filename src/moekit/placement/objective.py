"""What a placement is worth: shares of co-activation kept on one device, load balance, legal block sizes.

Legend: E experts, D devices. `groups[e]` is the device of expert e; `sizes[d]` the experts that device d holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moekit.errors import BadConfig, BadData, NumericFault
from moekit.placement.tokensets import TokenSets

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def nearest(number: int, legal: Sequence[int]) -> list[int]:
    """The next legal numbers below and above."""
    below, above = [n for n in legal if n < number], [n for n in legal if n > number]
    return ([max(below)] if below else []) + ([min(above)] if above else [])


def balanced_sizes(experts: int, devices: int, *, equal: bool = False) -> tuple[int, ...]:
    """Block sizes that differ by at most one, the larger blocks first.

    Args:
        experts: E.
        devices: D.
        equal: demand blocks of one size, as a stock export and transformers' own expert-parallel switch do.

    Raises:
        BadConfig: fewer experts than devices, or `equal` and D does not divide E; names the nearest legal D.
    """
    if devices < 1 or devices > experts:
        raise BadConfig(
            f"{experts} experts cannot be placed on {devices} devices",
            hint=f"choose 1 to {experts} devices, so that every device holds an expert",
        )
    if equal and experts % devices:
        near = nearest(devices, divisors(experts))
        raise BadConfig(
            f"{devices} devices do not divide {experts} experts into equal blocks",
            hint=f"the nearest legal numbers of devices are {' and '.join(map(str, near))}; "
            "or allow uneven blocks (moekit's own dispatchers take them)",
        )
    small, extra = divmod(experts, devices)
    return tuple([small + 1] * extra + [small] * (devices - extra))


def check_sizes(sizes: Sequence[int], experts: int, devices: int) -> tuple[int, ...]:
    """Refuse block sizes that do not fit.

    Raises:
        BadConfig: not one size of at least 1 per device, or they do not add up to E.
    """
    if len(sizes) != devices or min(sizes, default=0) < 1 or sum(sizes) != experts:
        raise BadConfig(
            f"block sizes {list(sizes)} do not place {experts} experts on {devices} devices",
            hint=f"give {devices} sizes of at least 1 that add up to {experts}, such as "
            f"{list(balanced_sizes(experts, devices))}",
        )
    return tuple(int(s) for s in sizes)


def pair_weights(coactivation_EE: torch.Tensor) -> Floats:
    """Off-diagonal co-activation counts as float64 (exact up to 2^53); the input is left as it is.

    Raises:
        BadData: not a symmetric square matrix, or a negative count off the diagonal.
        NumericFault: NaN or infinity.
    """
    if coactivation_EE.dim() != 2 or coactivation_EE.shape[0] != coactivation_EE.shape[1]:
        raise BadData(f"co-activation must be a square matrix [E, E], not {list(coactivation_EE.shape)}")
    weight_EE = coactivation_EE.detach().to("cpu", torch.float64).numpy().copy()
    np.fill_diagonal(weight_EE, 0.0)
    if not np.isfinite(weight_EE).all():
        expert = int(np.argwhere(~np.isfinite(weight_EE))[0, 0])
        raise NumericFault("co-activation is not finite", expert=expert, hint="record the trace again")
    if not np.array_equal(weight_EE, weight_EE.T):
        raise BadData("co-activation is not symmetric", hint="count every ordered pair of a token's experts")
    if (weight_EE < 0).any():
        expert = int(np.argwhere(weight_EE < 0)[0, 0])
        raise BadData("co-activation has negative counts", expert=expert, hint="record the trace again")
    return weight_EE


def intra_pairs(weight_EE: Floats, groups: Sequence[int] | Ints) -> float:
    """Sum of C_ij over pairs i < j on the same device."""
    group_E = np.asarray(groups)
    same_EE = group_E[:, None] == group_E[None, :]
    return float(weight_EE[same_EE].sum() / 2)


def intra_share(coactivation_EE: torch.Tensor, groups: Sequence[int]) -> float:
    """f: share of co-activated pairs on one device, in [0, 1]; with K = 2 rows per token are 2 - f.

    1.0 where no pair was ever counted (K = 1): nothing is separated then.
    """
    weight_EE = pair_weights(coactivation_EE)
    total = weight_EE.sum() / 2
    return intra_pairs(weight_EE, groups) / total if total else 1.0


def device_load(load_E: Floats, groups: Sequence[int] | Ints, devices: int) -> Floats:
    """Choices computed by each device, [D]."""
    load_D: Floats = np.bincount(np.asarray(groups), weights=load_E, minlength=devices).astype(np.float64)
    return load_D


def max_over_mean(load_D: Floats) -> float:
    """Largest device load over the mean; 1.0 is perfect balance, also for no load at all."""
    mean = load_D.mean()
    return float(load_D.max() / mean) if mean > 0 else 1.0


def relabel(groups: Sequence[int] | Ints, sizes: Sequence[int]) -> list[int]:
    """Number devices of equal size by their smallest expert, so that equal partitions compare equal."""
    group_E = np.asarray(groups)
    firsts = {int(d): int(np.argmax(group_E == d)) for d in np.unique(group_E)}
    renamed: dict[int, int] = {}
    for size in set(sizes):
        devices = [d for d, s in enumerate(sizes) if s == size]
        renamed |= dict(zip(sorted(devices, key=lambda d: firsts[d]), devices, strict=True))
    return [renamed[int(d)] for d in group_E]


@dataclass(frozen=True)
class Problem:
    """One layer's placement problem, checked.

    Attributes:
        weight_EE: co-activation counts, symmetric, zero diagonal.
        sizes: experts per device.
        load_E: choices of each expert.
        load_weight: weight lambda of the load term.
        sets: what the tokens of a sample chose; with it the objective is the exact number of rows, else pairs.
        seed: for random starts.
    """

    weight_EE: Floats
    sizes: tuple[int, ...]
    load_E: Floats
    load_weight: float = 0.0
    sets: TokenSets | None = None
    seed: int = 0

    @property
    def experts(self) -> int:
        """E."""
        return int(self.weight_EE.shape[0])

    @property
    def devices(self) -> int:
        """D."""
        return len(self.sizes)

    @property
    def total_pairs(self) -> float:
        """Sum of C_ij over i < j."""
        return float(self.weight_EE.sum() / 2)

    def share(self, groups: Sequence[int] | Ints) -> float:
        """Share f of the pairs kept, in [0, 1]."""
        total = self.total_pairs
        return intra_pairs(self.weight_EE, groups) / total if total else 1.0

    def kept(self, groups: Sequence[int] | Ints) -> float:
        """The objective without its load term: exact rows where token sets are given, else f."""
        return self.share(groups) if self.sets is None else self.sets.kept(np.asarray(groups), self.devices)

    def imbalance(self, groups: Sequence[int] | Ints) -> float:
        """Largest device load over the mean."""
        return max_over_mean(device_load(self.load_E, groups, self.devices))

    def value(self, groups: Sequence[int] | Ints) -> float:
        """To be maximised: kept - lambda * (max device load / mean - 1)."""
        penalty = self.load_weight * (self.imbalance(groups) - 1.0) if self.load_weight else 0.0
        return self.kept(groups) - penalty
