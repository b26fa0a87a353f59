"""What was chosen, with which gate weights.

Legend: N tokens, K choices a token, E experts, D domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.batch import TokenBatch, accumulate, widest
from moekit.trace.vocabulary import statistic


@statistic(shape="E", integer=True)
def load(seen: TokenBatch) -> Tensor:
    """Tokens that chose the expert."""
    return seen.chosen_NE.sum(0).long()


@statistic(shape="EE", integer=True)
def coactivation(seen: TokenBatch) -> Tensor:
    """Tokens that chose both experts; symmetric, the diagonal is the load (arXiv:2504.01337, section 3.2)."""
    # Products of zeros and ones, summed in fp32: exact up to 2^24 tokens, far more than one observation holds.
    return (seen.chosen_NE.T @ seen.chosen_NE).long()


def _by_domain(seen: TokenBatch, values_NE: Tensor) -> Tensor:
    wide = widest(values_NE.device)
    member_ND = torch.nn.functional.one_hot(seen.domain_N, seen.domains).to(wide)
    return member_ND.T @ values_NE.to(wide)


@statistic(shape="DE", integer=True)
def domain_load(seen: TokenBatch) -> Tensor:
    """Tokens of each domain that chose the expert."""
    return _by_domain(seen, seen.chosen_NE).long()


@statistic(shape="E", sources=("weights",))
def gate_mass(seen: TokenBatch) -> Tensor:
    """Sum of gate weights."""
    return accumulate(seen.gates_NE, 0)


@statistic(shape="E", sources=("weights",))
def gate_square(seen: TokenBatch) -> Tensor:
    """Sum of squared gate weights."""
    return accumulate(seen.gates_NE.square(), 0)


@statistic(shape="E", sources=("weights",), rule="max")
def gate_max(seen: TokenBatch) -> Tensor:
    """Largest gate weight; 0 if never chosen."""
    return seen.gates_NE.amax(0)


@statistic(shape="E", sources=("weights",), integer=True)
def first_load(seen: TokenBatch) -> Tensor:
    """Tokens for which the expert has the largest gate weight; ties go to the earlier choice."""
    first_N = seen.indices_NK.gather(1, seen.weights_NK.argmax(1, keepdim=True)).squeeze(1)
    return torch.bincount(first_N, minlength=seen.experts + 1)[: seen.experts]


@statistic(shape="DE", sources=("weights",))
def domain_gate_mass(seen: TokenBatch) -> Tensor:
    """Sum of gate weights over each domain's tokens."""
    return _by_domain(seen, seen.gates_NE)
