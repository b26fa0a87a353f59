"""Nested planes as a method: what the bits of an expert give, and too few of them."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from moekit.anatomy import Geometry
from moekit.compress.budget.bits import BitBudget
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.quantize.nested import NestedPlanes
from moekit.errors import BadConfig
from moekit.trace.statistics import LayerStatistics

GEOMETRY = Geometry(64, 4, 2, 32, 0, True, False, False, True)


def test_experts_of_more_bits_hold_those_of_fewer() -> None:
    inputs = LayerInputs(0, GEOMETRY, LayerStatistics(4, 64, width=32))
    group = torch.tensor([[0.9, -0.6, 0.1, 0.35, -0.2, 0.6]])
    made = [NestedPlanes(group=0).rounded({"up": group}, {"up": bits}, 0, inputs)["up"] for bits in (2, 3, 16)]
    assert made[0].tolist() == [[1, -0.5, 0, 0.5, 0, 0.5]]
    # One more plane, by hand: the same, an eighth up or down.
    assert (made[1] - made[0]).tolist() == [[-0.125, -0.125, 0.125, -0.125, -0.125, 0.125]]
    assert torch.equal(made[2], group)


def test_fewer_bits_than_the_first_plane_are_refused_before_any_work() -> None:
    inputs = {0: LayerInputs(0, GEOMETRY, LayerStatistics(4, 64, width=32))}
    method = NestedPlanes(group=32, base=3)
    budget = BitBudget(bits={"up": 4, "down": 2})
    with pytest.raises(BadConfig, match="2 bits are fewer than the 3 of the first plane") as told:
        method.allocate(inputs, {}, budget, None)
    assert (told.value.layer, told.value.expert) == (0, 0)
    with pytest.raises(ValidationError, match="no symmetric grid"):
        NestedPlanes(symmetric=True)
