"""From a recorded model to a placed one: counts equal a loop, and the placed model sends the same rows in blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.errors import BadData
from moekit.placement.apply import apply_placement, routing_groups
from moekit.placement.planning import place
from moekit.placement.simulation import place_trace, simulate
from moekit.trace import Trace, record
from tests.families import FAMILIES, build, tokens


def batches() -> list[torch.Tensor]:
    return [tokens(4, 20, seed=s) for s in range(3)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_by_loop_and_after_moving(family: str, tmp_path: Path) -> None:
    model = build(family)
    trace = record(model, batches())
    placement = place_trace(
        trace, 4, solver="swap", config={"load_weight": 0}, routing_groups=routing_groups(model.config)
    )
    placement.save(tmp_path / "placement.json")
    run = simulate(trace, type(placement).load(tmp_path / "placement.json"), home=None)
    for layer in trace.meta.layers:
        held = placement.layers[layer]
        rows = sum(len({held[e] for e in token}) for token in trace.indices(layer).tolist())
        assert run.layers[layer].rows_once_per_device == rows
        assert run.layers[layer].rows_once_per_expert == trace.meta.tokens * 2
        # K = 2: the objective is the share of tokens that send one row instead of two.
        assert placement.objective[layer] == pytest.approx(2 - rows / trace.meta.tokens)
    apply_placement(model, placement)
    moved = record(model, batches())
    in_blocks = simulate(moved, place_trace(moved, 4, solver="contiguous"), home=None)
    assert in_blocks.total.rows_once_per_device == run.total.rows_once_per_device
    assert in_blocks.total.load_D.tolist() == run.total.load_D.tolist()


def test_statistics_alone_are_enough_to_place_but_not_to_replay() -> None:
    model = build("mixtral")
    full = record(model, batches(), statistics=("coactivation", "load"))
    lean = record(model, batches(), statistics=("coactivation", "load"), keep_choices=False)
    assert isinstance(lean, Trace)
    placed = place_trace(lean, 2)
    assert placed.layers == place_trace(full, 2).layers
    with pytest.raises(BadData, match="statistics only"):
        simulate(lean, placed)
    counts = full.require(["coactivation"])
    by_hand = place({n: counts[n]["coactivation"] for n in full.meta.layers}, 2)
    assert by_hand.layers == placed.layers
