"""Exhaustive placement for few experts: tables over all subsets, then every partition without its mirror images.

A subset of experts is a bit mask. What a device gains from holding a subset is looked up in a table of 2^E entries,
so that any partition costs D look-ups, for pairs as for exact rows. Each block takes the lowest free expert, which
leaves out partitions that only name equal devices differently.

Legend: E experts, D devices, S = 2^E subsets, P partitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from moekit.placement.objective import Floats, Ints, Problem

# Tables over all subsets take 2^E entries, the list of partitions P x D.
MAX_EXPERTS = 16
MAX_PARTITIONS = 200_000


def count_partitions(sizes: Sequence[int]) -> int:
    """Number of partitions into blocks of these sizes, blocks of one size being alike.

    8 experts: 35 for two blocks of 4, 105 for four blocks of 2.
    """
    count = math.factorial(sum(sizes))
    for size in set(sizes):
        alike = sum(1 for s in sizes if s == size)
        count //= math.factorial(size) ** alike * math.factorial(alike)
    return count


def enumerable(sizes: Sequence[int]) -> bool:
    """Whether all partitions can be looked at in about a second: up to 12 experts on any number of devices."""
    return sum(sizes) <= MAX_EXPERTS and count_partitions(sizes) <= MAX_PARTITIONS


def subset_sums(value_E: Floats) -> Floats:
    """Sum over each subset's experts, [2^E]."""
    sums_S = np.zeros(1)
    for value in value_E:
        sums_S = np.concatenate([sums_S, sums_S + value])
    return sums_S


def subset_pairs(weight_EE: Floats) -> Floats:
    """Sum of C_ij over each subset's pairs, [2^E]."""
    pairs_S = np.zeros(1)
    for expert in range(len(weight_EE)):
        pairs_S = np.concatenate([pairs_S, pairs_S + subset_sums(weight_EE[expert, :expert])])
    return pairs_S


def subset_rows(problem: Problem) -> Floats:
    """Tokens that touch each subset (the rows a device holding it receives), [2^E].

    Tokens inside the complement are counted by summing over subsets one bit at a time.
    """
    sets = problem.sets
    assert sets is not None
    experts = sets.experts
    bit_E = np.append(1 << np.arange(experts, dtype=np.int64), 0)
    mask_U = bit_E[sets.set_UK].sum(axis=1)
    inside_S = np.bincount(mask_U, weights=sets.count_U, minlength=1 << experts)
    for expert in range(experts):
        view = inside_S.reshape(-1, 2, 1 << expert)
        view[:, 1] += view[:, 0]
    touching_S: Floats = (sets.tokens - inside_S[::-1]).astype(np.float64)
    return touching_S


def all_partitions(sizes: Sequence[int]) -> Ints:
    """Every partition as subsets per device, [P, D]; column d holds blocks of sizes[d]."""
    experts = sum(sizes)
    columns = {size: [d for d, s in enumerate(sizes) if s == size] for size in set(sizes)}
    # A partial partition is (device -> subset); the next block always takes the lowest free expert.
    partial_PD = np.zeros((1, len(sizes)), dtype=np.int64)
    for _ in sizes:
        grown = []
        used_P = partial_PD.sum(axis=1)
        for used in np.unique(used_P):
            rows_PD = partial_PD[used_P == used]
            free = [e for e in range(experts) if not int(used) >> e & 1]
            for size, devices in columns.items():
                filled_P = (rows_PD[:, devices] != 0).sum(axis=1)
                open_PD, device_P = rows_PD[filled_P < len(devices)], filled_P[filled_P < len(devices)]
                if not len(open_PD):
                    continue
                blocks = [sum(1 << e for e in (free[0], *rest)) for rest in combinations(free[1:], size - 1)]
                next_PD = np.repeat(open_PD, len(blocks), axis=0)
                column_P = np.repeat(np.array(devices)[device_P], len(blocks))
                next_PD[np.arange(len(next_PD)), column_P] = np.tile(np.array(blocks), len(open_PD))
                grown.append(next_PD)
        partial_PD = np.concatenate(grown)
    return partial_PD


def best_partition(problem: Problem) -> list[int]:
    """The best of all partitions, including the load term; the first in order where several are equal."""
    part_PD = all_partitions(problem.sizes)
    if problem.sets is None:
        total = problem.total_pairs
        kept_P = subset_pairs(problem.weight_EE)[part_PD].sum(axis=1) / (total or 1.0)
    else:
        kept_P = -subset_rows(problem)[part_PD].sum(axis=1) / (problem.sets.avoidable or 1)
    value_P = kept_P
    if problem.load_weight and problem.load_E.sum() > 0:
        heaviest_P = subset_sums(problem.load_E)[part_PD].max(axis=1)
        value_P = kept_P - problem.load_weight * heaviest_P / (problem.load_E.sum() / problem.devices)
    # Counts are exact, their shares are not: equal values may differ in the last bits.
    best = int(np.flatnonzero(value_P >= value_P.max() - 1e-12)[0])
    groups = [0] * problem.experts
    for device, subset in enumerate(part_PD[best].tolist()):
        for expert in range(problem.experts):
            if subset >> expert & 1:
                groups[expert] = device
    return groups
