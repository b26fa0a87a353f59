"""What all methods that round weights share: parts, bits and bytes of layers."""

from __future__ import annotations

import pytest

from moekit.anatomy import Geometry
from moekit.compress.budget.bits import BitBudget
from moekit.compress.budget.sizes import Budget
from moekit.compress.budget.sparsity import SparsityBudget
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.plan import budget_as
from moekit.compress.engine.quantizing import packed_bits_of, parts_of
from moekit.compress.quantize.rtn import RoundToNearest
from moekit.errors import BadConfig
from moekit.trace.statistics import LayerStatistics

GATED = Geometry(64, 4, 2, 32, 0, True, False, False, True)
PLAIN = Geometry(64, 4, 2, 32, 0, False, False, False, True)


def test_a_missing_gate_is_a_fault_only_where_it_was_meant() -> None:
    alike = BitBudget(bits={"gate": 3, "up": 3, "down": 3})
    assert parts_of(GATED, alike) == {"gate": 3, "up": 3, "down": 3}
    assert parts_of(PLAIN, alike) == {"up": 3, "down": 3}
    with pytest.raises(BadConfig, match="do not have"):
        parts_of(PLAIN, BitBudget(bits={"gate": 2, "up": 3, "down": 3}), 1)


def test_packed_bits_of_a_layer_by_hand() -> None:
    # Up: 2048 weights of 4 bits in 32 groups; down: one scale a row of 32 weights, 64 rows.
    assert packed_bits_of(GATED, {"up": (4,)}, 64) == 2048 * 4 + 32 * 20
    assert packed_bits_of(GATED, {"down": (2,)}, 0) == 2048 * 2 + 64 * 18
    assert packed_bits_of(GATED, {"up": (1, 3)}, 64) == 2048 * 4 + 32 * (16 + 19)


def test_every_expert_gets_the_bits_of_the_budget() -> None:
    seen = {n: LayerInputs(n, GATED, LayerStatistics(4, 64, width=32)) for n in (1, 3)}
    budget = BitBudget(bits={"up": 2, "down": 5})
    shares = RoundToNearest(group=16).allocate(seen, {}, budget, None)
    assert shares == {layer: {"up": (2,) * 4, "down": (5,) * 4} for layer in (1, 3)}
    with pytest.raises(BadConfig, match="groups of 64 do not divide the 32 inputs") as told:
        RoundToNearest(group=64).allocate(seen, {}, budget, None)
    assert told.value.layer == 1


def test_a_budget_of_another_kind_is_refused_by_its_meaning() -> None:
    with pytest.raises(BadConfig, match="how many bits a weight gets, not how many experts stay"):
        budget_as(Budget, BitBudget(bits={"up": 2}))
    with pytest.raises(BadConfig, match="how many weights become zero, not how many bits"):
        budget_as(BitBudget, SparsityBudget(sparsity=0.5))
