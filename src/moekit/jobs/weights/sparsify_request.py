"""What zeroing is asked for, of which model."""

from __future__ import annotations

from typing import cast

from moekit.compress.budget.parents import Original, expert_weights, find_original
from moekit.compress.budget.sparsity import SparsityBudget, remaining_sparsity, total_sparsity
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.zeroing import SparsifyMethod
from moekit.errors import BadConfig, MoekitError
from moekit.jobs.options.sparsify import SparsifyOptions
from moekit.jobs.shared.opened import OpenedModel
from moekit.jobs.weights import inplace_request


def method_of(options: SparsifyOptions) -> SparsifyMethod:
    """The method that was asked for, with its settings."""
    return cast(SparsifyMethod, inplace_request.method_of(options))


def request_of(options: SparsifyOptions, source: OpenedModel, seed: int) -> PlanRequest:
    """What is asked for, in shares of the weights that are there.

    Raises:
        BadConfig: a total that cannot be met, or a parent that says how many weights there were is gone.
    """
    method, original = method_of(options), _original(options, source)
    weights = None if original is None else original.weights
    if options.total is None:
        share = method.fixed_sparsity if options.sparsity is None else options.sparsity
        assert share is not None
        return PlanRequest(method, SparsityBudget(sparsity=share, original=weights), seed=seed)
    assert weights is not None
    removed = 1 - expert_weights(source.geometries) / weights
    share = remaining_sparsity(options.total, removed)
    if method.fixed_sparsity is not None:
        share = _fixed(method.fixed_sparsity, options.total, removed, source)
    budget = SparsityBudget(sparsity=share, total=options.total, original=weights)
    return PlanRequest(method, budget, seed=seed)


def _original(options: SparsifyOptions, source: OpenedModel) -> Original | None:
    try:
        return find_original(source.checkpoint, options.original)
    except MoekitError:
        if options.total is not None or options.original is not None:
            raise
        return None  # only a figure less to print


def _fixed(share: float, total: float, removed: float, source: OpenedModel) -> float:
    """The share that a pattern fixes, where it meets the total.

    Raises:
        BadConfig: it does not; names the total that it gives.
    """
    whole = total_sparsity(removed, share)
    inputs = max(max(g.hidden, g.width) for g in source.geometries.values())
    if abs(whole - total) > 1 / inputs:
        raise BadConfig(
            f"the total is to be {total:g}, but {removed:g} is removed and the pattern zeroes exactly {share:g} of the "
            f"rest, {whole:g} in all",
            hint=f"ask for a total of {whole:.6g}, for --set pattern=unstructured, or remove other experts",
        )
    return share
