"""Rules that rank: worked numbers, and what each one looks at."""

from __future__ import annotations

import pytest
import torch

from moekit.anatomy import Geometry
from moekit.compress.budget.bits import BitBudget, parse_choices
from moekit.compress.engine.bit_sharing import check_share
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import Room, WidthErrors, read_sharer
from moekit.compress.sharers.outlier import outlier_score
from moekit.errors import BadConfig, NumericFault
from moekit.trace.statistics import LayerStatistics

GEOMETRY = Geometry(8, 4, 2, 4, 0, True, False, False, True)
ROOM = Room(2.5, (2, 4), "expert", {0: 96, 1: 96}, {0: 4, 1: 4})


def layers(**named: list[list[float]]) -> dict[int, LayerInputs]:
    """Two layers of four experts with these statistics."""
    values = [{name: torch.tensor(rows[n]) for name, rows in named.items()} for n in range(2)]
    return {n: LayerInputs(n, GEOMETRY, LayerStatistics(4, 8, (), 100, values[n], width=4)) for n in range(2)}


def test_the_outlier_score_by_hand() -> None:
    weight = torch.tensor([[1.0, 2, -1], [1, -2, 1], [-1, 2, 10], [1, 2, 0]])
    assert outlier_score(weight) == pytest.approx(10 / 3)
    assert outlier_score(weight.T) == pytest.approx(2.3077, abs=1e-4)
    assert outlier_score(-7 * weight) == pytest.approx(10 / 3)
    assert outlier_score(torch.tensor([[2.0, -3], [-2, 3]])) == 1
    assert outlier_score(torch.zeros(2, 2)) == 1


def test_the_most_used_experts_of_each_layer_or_of_all() -> None:
    seen = layers(load=[[10, 40, 30, 20], [97, 1, 1, 1]])
    assert read_sharer("frequency").share(seen, {}, ROOM) == {0: (2, 4, 2, 2), 1: (4, 2, 2, 2)}
    wide = read_sharer({"use": "frequency", "scope": "model"})
    more = Room(3, (2, 4), "expert", ROOM.sizes, ROOM.experts)
    assert wide.share(seen, {}, more) == {0: (2, 4, 4, 4), 1: (4, 2, 2, 2)}


def test_the_first_layers_and_the_blocks_that_change_most() -> None:
    seen = layers(block_cosine=[[90.0], [10.0]])
    half = Room(3, (2, 4), "layer", ROOM.sizes, ROOM.experts)
    assert read_sharer("layers").share(seen, {}, half) == {0: (4,) * 4, 1: (2,) * 4}
    assert read_sharer("blocks").share(seen, {}, half) == {0: (2,) * 4, 1: (4,) * 4}


def test_pmqs_costs_by_hand_and_what_no_token_chose() -> None:
    seen = layers(load=[[50, 30, 0, 20]] * 2, chosen_score=[[30.0, 15, 0, 5]] * 2)
    errors = WidthErrors(torch.tensor([[64.0, 16], [36, 9], [0, 0], [16, 4]]).double(), 100.0)
    cost = read_sharer("pmq").costs(seen[0], errors, ROOM)  # type: ignore[attr-defined]
    expected = [[0.5 * 0.3 * 64, 0.5 * 0.3 * 16], [0.3 * 0.15 * 36, 0.3 * 0.15 * 9], [0, 0], [0.2 * 0.05 * 16, 0.04]]
    torch.testing.assert_close(cost, torch.tensor(expected).double())
    other = read_sharer({"use": "pmq", "alpha": 0, "beta": 0, "gamma": 1, "scope": "model"})
    flat = other.costs(seen[0], errors, ROOM)  # type: ignore[attr-defined]
    torch.testing.assert_close(flat, torch.tensor([[0.8, 0.4], [0.6, 0.3], [0, 0], [0.4, 0.2]]).double())


def test_layers_compete_under_one_budget_and_not_under_their_own() -> None:
    seen = layers(load=[[25] * 4] * 2)
    low = torch.tensor([[0.4, 0.1]] * 4).double()
    errors = {0: WidthErrors(low, 1.0), 1: WidthErrors(10 * low, 1.0)}
    room = Room(3, (2, 4), "expert", ROOM.sizes, ROOM.experts)
    assert read_sharer("gemq").share(seen, errors, room) == {0: (2,) * 4, 1: (4,) * 4}
    assert read_sharer({"use": "gemq", "scope": "layer"}).share(seen, errors, room) == {
        n: (4, 4, 2, 2) for n in range(2)
    }
    ruled = read_sharer({"use": "gemq", "spread": True}).share(seen, errors, room)
    assert ruled == {0: (4, 2, 2, 2), 1: (4, 4, 4, 2)}


@pytest.mark.parametrize("share", ["pmq", "gemq"])
def test_costs_of_a_whole_layer_are_those_of_its_experts(share: str) -> None:
    seen = layers(load=[[25] * 4] * 2, chosen_score=[[10.0] * 4] * 2)
    errors = {n: WidthErrors((n + 1) * torch.tensor([[0.4, 0.1]] * 4).double(), 1.0) for n in range(2)}
    room = Room(3, (2, 4), "layer", ROOM.sizes, ROOM.experts)
    assert read_sharer(share).share(seen, errors, room) == {0: (2,) * 4, 1: (4,) * 4}


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(BadConfig, match="same whole number"):
        read_sharer("uniform").share(layers(load=[[1] * 4] * 2), {}, ROOM)
    with pytest.raises(BadConfig, match="tells experts of a layer apart") as told:
        check_share(read_sharer("frequency"), BitBudget(mean=3, choices=(2, 4), unit="layer", share={"use": "x"}))
    assert "--unit expert" in str(told.value.hint)
    with pytest.raises(BadConfig, match="cannot be had of widths 3, 4") as told:
        check_share(read_sharer("pmq"), BitBudget(mean=2.5, choices=(3, 4), share={"use": "pmq"}))
    assert "say 3" in str(told.value.hint)
    with pytest.raises(BadConfig, match="no sharer method"):
        read_sharer("pqm")


def test_widths_to_choose_from() -> None:
    assert parse_choices("4, 2,3") == parse_choices([2, 3, 4, 4]) == (2, 3, 4)
    assert parse_choices(3) == (3,)
    for wrong in ("2,x", "0,2", "9", ""):
        with pytest.raises(BadConfig):
            parse_choices(wrong)


def test_a_budget_says_one_thing() -> None:
    for wrong in ({}, {"bits": {"up": 3}, "mean": 3, "choices": (2, 3)}, {"mean": 3}, {"bits": {"up": 9}}):
        with pytest.raises(ValueError, match=r"bits|mean"):
            BitBudget(**wrong)  # type: ignore[arg-type]


def test_no_bits_are_shared_by_what_is_no_number() -> None:
    half = Room(3, (2, 4), "layer", ROOM.sizes, ROOM.experts)
    with pytest.raises(NumericFault, match="layer 1"):
        read_sharer("blocks").share(layers(block_cosine=[[90.0], [float("nan")]]), {}, half)
