"""Upper bounds on f: how far from the best a placement can be at most, for any number of experts.

All are valid for every partition into the given block sizes; the smallest is taken. X is the E x D indicator of the
partition, C the counts, u any vector with sum 0 (diag u adds nothing to a partition's value; tightening over u is
convex, done by a subgradient walk):

- *partners*: an expert on a device of s has at most s - 1 strongest partners beside it, each pair counted twice;
- *spectral* (Donath and Hoffman 1973): kept = 1/2 tr X'(C + diag u)X <= 1/2 sum_d s_d lambda_d(C + diag u);
- *projected* (Rendl and Wolkowicz 1995), for blocks of one size s: X / sqrt(s) is orthonormal and spans the constant
  unit vector e, so kept <= s/2 (e'(C + diag u)e + the D - 1 largest eigenvalues on the complement of e). Uneven blocks
  are filled up with experts that nobody co-activates, which can only raise the optimum.

Legend: E experts, D devices, V eigenvectors kept, R size of e's complement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moekit.placement.objective import Floats, Problem

# Bound and subgradient at a diagonal shift u.
_Evaluate = Callable[[Floats], tuple[float, Floats]]


def partner_bound(weight_EE: Floats, sizes: Sequence[int]) -> float:
    """Half the sum of the heaviest partners each expert could have, in counts.

    Only as many experts as blocks of more than t places hold can have a t-th partner: those whose t-th is heaviest.
    """
    partners_EE = -np.sort(-weight_EE, axis=1)
    kept = 0.0
    for rank in range(max(sizes) - 1):
        holders = sum(s for s in sizes if s > rank + 1)
        kept += float(-np.sort(-partners_EE[:, rank])[:holders].sum())
    return kept / 2


def _plain(weight_EE: Floats, sizes: Sequence[int]) -> _Evaluate:
    ascending_V = np.sort(np.array(sizes, dtype=np.float64))

    def evaluate(shift_E: Floats) -> tuple[float, Floats]:
        values, vectors = np.linalg.eigh(weight_EE + np.diag(shift_E))
        top_EV = vectors[:, -len(sizes) :]
        bound = float(values[-len(sizes) :] @ ascending_V) / 2
        return bound, (top_EV**2) @ ascending_V / 2

    return evaluate


def _projected(weight_EE: Floats, size: int, devices: int) -> _Evaluate:
    experts = len(weight_EE)
    basis_ER = np.linalg.qr(np.column_stack([np.ones(experts), np.eye(experts)[:, 1:]]))[0][:, 1:]
    kept = devices - 1

    def evaluate(shift_E: Floats) -> tuple[float, Floats]:
        shifted_EE = weight_EE + np.diag(shift_E)
        values, vectors = np.linalg.eigh(basis_ER.T @ shifted_EE @ basis_ER)
        top_EV = basis_ER @ vectors[:, len(vectors) - kept :]
        bound = size / 2 * (shifted_EE.sum() / experts + values[len(values) - kept :].sum())
        return float(bound), size / 2 * (1 / experts + (top_EV**2).sum(axis=1))

    return evaluate


def _walk(evaluate: _Evaluate, experts: int, goal: float, steps: int) -> float:
    """Lower the bound over u with Polyak steps towards a value known to be reached."""
    shift_E = np.zeros(experts)
    best, patience, stride = np.inf, 0, 1.0
    for _ in range(steps):
        bound, gradient_E = evaluate(shift_E)
        patience = 0 if bound < best - 1e-9 else patience + 1
        best = min(best, bound)
        if patience >= 10:
            stride, patience = stride / 2, 0
        gradient_E = gradient_E - gradient_E.mean()
        norm = float(gradient_E @ gradient_E)
        if best - goal < 1e-9 or norm < 1e-15 or stride < 1e-3:
            break
        shift_E = shift_E - stride * (bound - goal) / norm * gradient_E
    return float(best)


def spectral_bound(weight_EE: Floats, sizes: Sequence[int], *, target: float = 0.0, steps: int = 150) -> float:
    """Eigenvalue bound in counts: projected for equal blocks, the better of both for uneven ones.

    Args:
        weight_EE: symmetric counts with zero diagonal.
        sizes: experts per device.
        target: counts a known placement keeps; the walk stops when the bound meets it.
        steps: eigenvalue decompositions to spend on each.
    """
    size, devices, scale = max(sizes), len(sizes), float(weight_EE.sum() / 2)
    if size <= 1 or scale == 0:
        return 0.0
    padded = size * devices
    full_EE = np.zeros((padded, padded))
    full_EE[: len(weight_EE), : len(weight_EE)] = weight_EE / scale
    best = _walk(_projected(full_EE, size, devices), padded, target / scale, steps)
    if padded > len(weight_EE):
        best = min(best, _walk(_plain(weight_EE / scale, sizes), len(weight_EE), target / scale, steps))
    # Eigenvalues of a matrix of this scale are good to about 1e-14; round outwards so that the bound stays one.
    return (best + 1e-10) * scale


def upper_bound(problem: Problem, *, target: float = 0.0, steps: int = 150) -> float:
    """Upper bound on the problem's value over all placements with its block sizes.

    Args:
        problem: the layer's problem. Exact rows are bounded through pairs: a token with k experts in r blocks keeps
            at least the pairs of an even spread, so that a bound on pairs limits the rows they can spare.
        target: value of a known placement, without load term, in shares of all pairs.
        steps: eigenvalue decompositions to spend; 0 leaves the partner bound alone.
    """
    weight_EE = problem.weight_EE if problem.sets is None else problem.sets.pairs_EE()
    total = float(weight_EE.sum() / 2)
    kept = min(total, partner_bound(weight_EE, problem.sizes))
    if steps and total:
        kept = min(kept, spectral_bound(weight_EE, problem.sizes, target=target * total, steps=steps))
    share = (kept / total if total else 1.0) if problem.sets is None else _row_share(problem, kept)
    return share - problem.load_weight * (least_imbalance(problem.load_E, problem.sizes) - 1.0)


def least_imbalance(load_E: Floats, sizes: Sequence[int]) -> float:
    """Lower bound on the largest device load over the mean, over all placements with these block sizes.

    Of the j D + 1 heaviest experts some device holds j + 1, and its further places hold at least the lightest experts
    there are; j = 0 is the device of the heaviest expert. No balance is better than perfect.

    Args:
        load_E: choices of each expert.
        sizes: experts per device.
    """
    mean = float(load_E.sum()) / len(sizes)
    if mean <= 0:
        return 1.0
    ascending_E = np.sort(load_E)
    descending_E = ascending_E[::-1]
    least = mean
    for more in range((len(load_E) - 1) // len(sizes) + 1):
        last = more * len(sizes)
        together = float(descending_E[last - more : last + 1].sum())
        least = max(least, together + float(ascending_E[: max(0, min(sizes) - more - 1)].sum()))
    return least / mean


def _least_pairs(choices: int, blocks: int) -> int:
    """Pairs that stay together at least when this many experts lie in this many blocks: an even spread."""
    size, larger = divmod(choices, blocks)
    return larger * (size + 1) * size // 2 + (blocks - larger) * size * (size - 1) // 2


def _row_share(problem: Problem, kept_pairs: float) -> float:
    """Most rows that a budget of kept pairs can spare: the cheapest rows first (their cost in pairs only grows)."""
    sets = problem.sets
    assert sets is not None
    if not sets.avoidable:
        return 1.0
    tokens_K = np.bincount((sets.set_UK < sets.experts).sum(axis=1), weights=sets.count_U)
    offers: list[tuple[int, float]] = []
    for choices, tokens in enumerate(tokens_K):
        # No token needs fewer rows than its experts fill blocks of the largest size.
        fewest = -(-choices // max(problem.sizes))
        costs = [_least_pairs(choices, r) - _least_pairs(choices, r + 1) for r in range(choices - 1, fewest - 1, -1)]
        offers += [(cost, float(tokens)) for cost in costs if tokens]
    spared, budget = 0.0, kept_pairs
    for cost, tokens in sorted(offers):
        rows = min(tokens, budget / cost)
        spared, budget = spared + rows, budget - rows * cost
    return min(1.0, spared / sets.avoidable)
