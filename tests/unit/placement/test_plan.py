"""The placement file: orders, equality of blocks, and what is refused on reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moekit.errors import BadConfig, BadData, UnsafeInput
from moekit.placement.plan import Placement


def a_placement(**changes: Any) -> Placement:
    values: dict[str, Any] = {
        "fingerprint": "abc",
        "devices": 3,
        "experts": 6,
        "layers": {1: [2, 0, 1, 0, 2, 1], 4: [0, 0, 1, 1, 1, 2]},
        "solver": "swap",
        "objective": {1: 0.5, 4: 0.25},
        "bound": {1: 0.75, 4: 0.25},
    }
    return Placement(**values | changes)


def test_order_gives_each_device_a_block() -> None:
    placement = a_placement()
    assert placement.order(1) == [1, 3, 2, 5, 0, 4]
    assert [placement.layers[1][e] for e in placement.order(1)] == [0, 0, 1, 1, 2, 2]
    assert placement.orders()[4] == list(range(6))
    assert placement.sizes(1) == [2, 2, 2]
    assert placement.sizes(4) == [2, 3, 1]
    assert not placement.is_equal
    assert a_placement(layers={1: [2, 0, 1, 0, 2, 1]}).is_equal
    assert placement.gap == {1: 0.25, 4: 0.0}
    assert a_placement(bound=None).gap is None


def test_round_trip(tmp_path: Path) -> None:
    placement = a_placement(replicas={1: {0: [0, 1]}}, seed=7, config={"perturbations": 3}, proven=[4])
    placement.save(tmp_path / "placement.json")
    again = Placement.load(tmp_path / "placement.json")
    assert again == placement
    assert again.hash == placement.hash
    assert again.holders(1) == [[2, 0, 1], [0], [1], [0], [2], [1]]
    assert [p.name for p in tmp_path.iterdir()] == ["placement.json"]


def test_hash_says_where_things_lie_and_nothing_else() -> None:
    assert a_placement(seed=1, solver="exact").hash == a_placement().hash
    assert a_placement(nodes=3).hash != a_placement().hash
    assert a_placement(layers={1: [2, 0, 1, 0, 1, 2], 4: [0, 0, 1, 1, 1, 2]}).hash != a_placement().hash
    assert a_placement(replicas={1: {0: [1]}}).hash != a_placement().hash
    assert a_placement(replicas={1: {}}).hash == a_placement().hash


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": {}},
        {"layers": {0: [0, 1, 3, 0, 1, 2]}},
        {"layers": {0: [0, -1, 1, 0, 1, 2]}},
        {"layers": {0: [0, 1]}},
        {"layers": {0: []}},
        {"nodes": 4},
        {"devices": 0},
        {"replicas": {2: {0: [1]}}},
        {"replicas": {1: {6: [1]}}},
        {"replicas": {1: {0: [2]}}},
        {"replicas": {1: {0: [3]}}},
        {"unknown": 1},
    ],
)
def test_impossible_placements(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        a_placement(**changes)


def test_another_model_and_another_layer() -> None:
    placement = a_placement()
    placement.check_model("abc")
    placement.check_model("")
    with pytest.raises(BadConfig, match="made for model abc"):
        placement.check_model("abd")
    with pytest.raises(BadConfig, match="no such layer") as caught:
        placement.order(2)
    assert caught.value.layer == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"devices": 2}', '{"format": 1, "devices": "x"}'])
def test_damaged_files(text: str, tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    file.write_text(text)
    with pytest.raises((BadData, UnsafeInput)) as caught:
        Placement.load(file)
    assert caught.value.file == str(file)


def test_missing_newer_and_nested_files(tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    with pytest.raises(BadData, match="no placement file"):
        Placement.load(file)
    file.write_text(json.dumps({**json.loads(a_placement().model_dump_json()), "format": 2}))
    with pytest.raises(BadData, match="newer moekit"):
        Placement.load(file)
    file.write_text('{"layers": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises((BadData, UnsafeInput)):
        Placement.load(file)
