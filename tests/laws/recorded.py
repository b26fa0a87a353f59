"""Tiny fp64 models, a text of two domains, and every registered statistic of it, recorded once a process in each way.

Three contract families: concatenated experts with a softmax router; grouped sigmoid router with bias, a shared expert
and a dense first layer; transposed, interleaved experts with biases and attention sinks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from moekit.trace import Trace, record
from moekit.trace.statistics import LayerStatistics, Statistics
from moekit.trace.vocabulary import Statistic, get, known_statistics
from tests.families import build, tokens

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")
# Members of families of statistics, beside every statistic that is registered under its own name.
MEMBERS = ("power(1,1,2)", "pool_utility(0)", "pool_logit(3)", "pool_peak(0)")
# What a family does not have, and so cannot show.
LACKING = {"qwen3_moe": ("shared_peak", "neuron_magnitude"), "gpt_oss": ("shared_peak", "neuron_magnitude")}
LACKING["deepseek_v3"] = ("neuron_magnitude",)
EVERY = tuple(sorted((*known_statistics(), *MEMBERS)))
CASES = [(family, name) for family in FAMILIES for name in EVERY if name not in LACKING[family]]
LENGTH = 9
IDS_BS = tokens(4, LENGTH, seed=11)


@cache
def model(family: str) -> PreTrainedModel:
    """A tiny model in fp64; not to be changed."""
    made = build(family)
    made.set_experts_implementation("eager")
    return made.double()


def fresh(family: str) -> PreTrainedModel:
    """The same, for a test that changes it."""
    return copy.deepcopy(model(family))


def batch(rows: Sequence[int], *, padded: int = 0, cut: int = LENGTH) -> Any:
    """Rows of the text, each a document; odd ones are of the second domain.

    Args:
        rows: which.
        padded: columns of padding behind all rows.
        cut: tokens that are left of every row.
    """
    ids_BS = IDS_BS[list(rows), :cut]
    mask_BS = torch.ones(len(rows), cut + padded, dtype=torch.int64)
    mask_BS[:, cut:] = 0
    row_B1 = torch.tensor(rows)[:, None]
    return SimpleNamespace(
        input_ids=torch.nn.functional.pad(ids_BS, (0, padded), value=7),
        attention_mask=mask_BS,
        document_BS=row_B1.expand_as(mask_BS),
        domain_BS=(row_B1 % 2).expand_as(mask_BS),
        domains=("prose", "sums"),
    )


def names(family: str) -> tuple[str, ...]:
    """What can be recorded of a family."""
    return tuple(name for name in EVERY if name not in LACKING[family])


def traced(family: str, batches: Sequence[Any], **options: Any) -> Trace:
    """Everything of some batches."""
    return record(model(family), batches, statistics=names(family), fingerprint="a model", **options)


@cache
def whole(family: str) -> Statistics:
    """Everything of the whole text in one batch."""
    found = traced(family, [batch(range(4))]).statistics
    assert found is not None
    return found


def close(name: str, first: LayerStatistics, second: LayerStatistics, rtol: float = 1e-6) -> None:
    """Assert one statistic equal: counts exactly, reals to a part of its largest value (routers round to fp32)."""
    left, right = first[name], second[name]
    assert left.shape == right.shape
    if not left.is_floating_point():
        assert torch.equal(left, right), name
        return
    largest = max(float(left.abs().max()), 1e-300) if left.numel() else 1.0
    assert bool(left.isfinite().all())
    assert float((left - right).abs().max()) <= rtol * largest, name


def permuted(entry: Statistic, value: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """A statistic's tensor with its axes E in another order: position `new` holds what `order[new]` was."""
    for axis, letter in enumerate(entry.shape):
        if letter == "E":
            value = value.index_select(axis, torch.tensor(order))
    return value


__all__ = ["CASES", "FAMILIES", "batch", "close", "fresh", "get", "model", "names", "permuted", "traced", "whole"]
