"""Pairwise-swap search: the state of a partition under two objectives, descent, and perturbations out of local optima.

Swapping two experts keeps every block size, so that uneven blocks need no special case. Both states answer "what is
gained if experts i and j change places?" for all pairs at once and update themselves after a swap.

Legend: E experts, D devices, U distinct token sets, K choices a token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moekit.placement.greedy import greedy_groups
from moekit.placement.objective import Floats, Ints, Problem
from moekit.placement.tokensets import CHUNK_SETS, TokenSets

# Gains below this share are rounding, not progress: counts are exact, shares are not.
EPSILON = 1e-12


class SwapState(Protocol):
    """A partition that knows what each swap would gain."""

    group_E: Ints

    def gains_EE(self) -> Floats:
        """Increase of the objective (without load term) if i and j change places; any value within a device."""

    def swap(self, first: int, second: int) -> None:
        """Let two experts change places."""


class PairState:
    """Objective f: gain of a swap from the affinity of each expert to each device."""

    def __init__(self, weight_EE: Floats, groups: Sequence[int] | Ints, devices: int, total: float) -> None:
        self.group_E: Ints = np.array(groups, dtype=np.int64)
        self._weight_EE = weight_EE
        self._scale = 1.0 / total if total else 0.0
        member_ED = np.zeros((len(self.group_E), devices))
        member_ED[np.arange(len(self.group_E)), self.group_E] = 1.0
        self._affinity_ED = weight_EE @ member_ED

    def gains_EE(self) -> Floats:
        """Gain_ij = (S[i, g_j] - S[i, g_i]) + (S[j, g_i] - S[j, g_j]) - 2 W_ij."""
        towards_EE = self._affinity_ED[:, self.group_E]
        towards_EE = towards_EE - np.diagonal(towards_EE)[:, None]
        gain_EE: Floats = (towards_EE + towards_EE.T - 2.0 * self._weight_EE) * self._scale
        return gain_EE

    def swap(self, first: int, second: int) -> None:
        """Let two experts change places."""
        a, b = self.group_E[first], self.group_E[second]
        moved_E = self._weight_EE[:, second] - self._weight_EE[:, first]
        self._affinity_ED[:, a] += moved_E
        self._affinity_ED[:, b] -= moved_E
        self.group_E[first], self.group_E[second] = b, a


class RowState:
    """Objective: exact rows spared. Keeps, per expert, what leaving its device and entering another would change.

    For a set that holds i but not j the swap spares a row where i was alone on its device, and costs one where no
    other expert of the set is on j's device. Sets that hold both do not change; the naive sum of both moves charges
    them where one of the two is alone, which `together` takes back.
    """

    def __init__(self, sets: TokenSets, groups: Sequence[int] | Ints, devices: int) -> None:
        self.group_E: Ints = np.array(groups, dtype=np.int64)
        self._sets = sets
        self._devices = devices
        self._experts = sets.experts
        self._scale = 1.0 / sets.avoidable if sets.avoidable else 0.0
        width = sets.experts + 1
        self._leave_E = np.zeros(width)
        self._enter_ED = np.zeros((width, devices + 1))
        self._together_EE = np.zeros((width, width))
        # Sets of each expert, so that a swap touches only the sets that hold one of the two.
        flat = np.argsort(sets.set_UK, axis=None, kind="stable")
        ends = np.searchsorted(sets.set_UK.ravel()[flat], np.arange(sets.experts + 1))
        self._sets_of = [flat[ends[e] : ends[e + 1]] // sets.set_UK.shape[1] for e in range(sets.experts)]
        for start in range(0, len(sets.count_U), CHUNK_SETS):
            self._add(np.arange(start, min(start + CHUNK_SETS, len(sets.count_U))), 1.0)

    def _add(self, rows_U: Ints, sign: float) -> None:
        """Add (or with sign -1 take away) what these sets contribute under the present partition."""
        set_UK, weight_U = self._sets.set_UK[rows_U], self._sets.count_U[rows_U] * sign
        width, columns = self._experts + 1, self._devices + 1
        device_UK = np.append(self.group_E, self._devices)[set_UK]
        count_UD = np.zeros((len(rows_U), columns), dtype=np.int64)
        np.add.at(count_UD, (np.arange(len(rows_U))[:, None], device_UK), 1)
        alone_UK = np.take_along_axis(count_UD, device_UK, axis=1) == 1
        alone_weight_UK = np.where(alone_UK, weight_U[:, None], 0.0)
        self._leave_E += np.bincount(set_UK.ravel(), alone_weight_UK.ravel(), minlength=width)
        absent_UD = np.where(count_UD == 0, weight_U[:, None], 0.0)
        choices = set_UK.shape[1]
        for k in range(choices):
            flat = set_UK[:, k, None] * columns + np.arange(columns)
            entering = np.bincount(flat.ravel(), absent_UD.ravel(), minlength=width * columns)
            self._enter_ED += entering.reshape(width, columns)
        pair_UKK = set_UK[:, :, None] * width + set_UK[:, None, :]
        weight_UKK = np.broadcast_to(alone_weight_UK[:, :, None], pair_UKK.shape)
        together = np.bincount(pair_UKK.ravel(), weight_UKK.ravel(), minlength=width * width)
        self._together_EE += together.reshape(width, width)

    def gains_EE(self) -> Floats:
        """Rows spared by each swap, as a share of the avoidable rows."""
        experts = self._experts
        leave_E = self._leave_E[:experts]
        move_EE = leave_E[:, None] - self._enter_ED[:experts][:, self.group_E]
        together_EE = self._together_EE[:experts, :experts]
        gain_EE: Floats = (move_EE + move_EE.T - together_EE - together_EE.T) * self._scale
        return gain_EE

    def swap(self, first: int, second: int) -> None:
        """Let two experts change places."""
        touched_U = np.union1d(self._sets_of[first], self._sets_of[second])
        self._add(touched_U, -1.0)
        self.group_E[first], self.group_E[second] = self.group_E[second], self.group_E[first]
        self._add(touched_U, 1.0)


def state_of(problem: Problem, groups: Sequence[int] | Ints) -> SwapState:
    """The state that fits the problem's objective."""
    if problem.sets is not None:
        return RowState(problem.sets, groups, problem.devices)
    return PairState(problem.weight_EE, groups, problem.devices, problem.total_pairs)


def imbalance_after_EE(load_E: Floats, group_E: Ints, devices: int) -> Floats:
    """max/mean device load if i and j changed places, [E, E]."""
    load_D = np.bincount(group_E, weights=load_E, minlength=devices)
    mean = load_D.mean()
    if mean <= 0:
        return np.ones((len(load_E), len(load_E)))
    # Largest load among the devices that a swap of (a, b) leaves alone.
    order = np.argsort(-load_D)
    rest_DD = np.full((devices, devices), -np.inf)
    for device in order[:3][::-1]:
        free = np.ones((devices, devices), dtype=bool)
        free[device, :] = free[:, device] = False
        rest_DD[free] = load_D[device]
    step_EE = load_E[None, :] - load_E[:, None]
    own_E = load_D[group_E]
    after_EE = np.maximum(own_E[:, None] + step_EE, own_E[None, :] - step_EE)
    result: Floats = np.maximum(after_EE, rest_DD[group_E[:, None], group_E[None, :]]) / mean
    return result


def descend(problem: Problem, state: SwapState, deadline: float) -> None:
    """Take the best swap until none improves the objective with its load term, or time is over."""
    while time.monotonic() < deadline:
        gain_EE = state.gains_EE()
        if problem.load_weight:
            after_EE = imbalance_after_EE(problem.load_E, state.group_E, problem.devices)
            gain_EE = gain_EE + problem.load_weight * (problem.imbalance(state.group_E) - after_EE)
        gain_EE[state.group_E[:, None] == state.group_E[None, :]] = -np.inf
        best = int(np.argmax(gain_EE))
        first, second = divmod(best, problem.experts)
        if not gain_EE[first, second] > EPSILON:
            return
        state.swap(first, second)


def perturb(state: SwapState, swaps: int, rng: np.random.Generator) -> None:
    """Swap random pairs on different devices."""
    for _ in range(swaps):
        first = int(rng.integers(len(state.group_E)))
        others: npt.NDArray[np.intp] = np.flatnonzero(state.group_E != state.group_E[first])
        if len(others):
            state.swap(first, int(rng.choice(others)))


def _best(
    problem: Problem, starts: Sequence[Ints], perturbations: int, rng: np.random.Generator, deadline: float
) -> Ints:
    """The best local optimum from these starts and from perturbations of the best."""
    best_E, best_value = starts[0], -math.inf
    for number in range(len(starts) + perturbations):
        state = state_of(problem, starts[number] if number < len(starts) else best_E)
        if number >= len(starts):
            perturb(state, max(2, problem.experts // 16), rng)
        descend(problem, state, deadline)
        value = problem.value(state.group_E)
        if value > best_value + EPSILON:
            best_E, best_value = state.group_E.copy(), value
        if time.monotonic() > deadline:
            break
    return best_E


def multi_start(problem: Problem, *, starts: int, perturbations: int, time_limit: float) -> list[int]:
    """Descend from the contiguous blocks, the greedy groups and random ones; perturb the best; then count exact rows.

    Where load counts, blocks balanced by load alone are a start, too: what is found is worth at least as much as they.

    Args:
        problem: with token sets the row objective starts where the search by pairs ended (and from the contiguous
            and the balanced blocks), so that it never sends more rows than that.
        starts: random starts.
        perturbations: disturbances of the best; a quarter of them for rows, which cost more.
        time_limit: seconds; what is found by then is returned.
    """
    deadline = time.monotonic() + time_limit
    rng = np.random.default_rng(problem.seed)
    blocks_E = np.repeat(np.arange(problem.devices), problem.sizes)
    plain = [blocks_E, *([balanced_blocks(problem.load_E, problem.sizes)] if problem.load_weight else [])]
    first = [*plain, np.array(greedy_groups(problem)), *(rng.permutation(blocks_E) for _ in range(starts))]
    group_E = _best(replace(problem, sets=None), first, perturbations, rng, deadline)
    if problem.sets is not None:
        group_E = _best(problem, [group_E, *plain], math.ceil(perturbations / 4), rng, deadline)
    return [int(device) for device in group_E]


def balanced_blocks(load_E: Floats, sizes: Sequence[int]) -> Ints:
    """Device of each expert by load alone: the heaviest first, onto the device with least load that has room.

    Args:
        load_E: choices of each expert.
        sizes: experts per device.
    """
    free, load_D = list(sizes), [0.0] * len(sizes)
    group_E = np.zeros(len(load_E), dtype=np.int64)
    for expert in np.argsort(-load_E, kind="stable"):
        device = min((d for d in range(len(sizes)) if free[d]), key=lambda d: (load_D[d], d))
        group_E[expert] = device
        free[device] -= 1
        load_D[device] += float(load_E[expert])
    return group_E
