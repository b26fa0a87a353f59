"""Paused passes against plain forwards, for models whose layers hand on all kinds of things."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.errors import UnsupportedModel
from moekit.streaming.walk import Walk
from tests.families import build
from tests.unit.streaming.handing import MODELS, ONLY_ANSWERS, InMemory, batches, made


def walked(model: Any, name: str, **options: Any) -> tuple[Walk, list[Any]]:
    loader: Any = InMemory(model)
    given = batches(name, model)
    walk = Walk(loader, given, **options)
    with torch.no_grad():
        return walk, [model(**walk.inputs(number)).logits for number in range(len(given))]


def go(passes: Any, first: int, last: int) -> None:
    """Take all batches through layers first to last."""
    for index in range(first, last + 1):
        for number in range(len(passes)):
            passes.run(index, number)
            passes.go_on(index, number)


def finished(passes: Any, expected: list[Any]) -> None:
    for number, logits in enumerate(expected):
        assert torch.equal(passes.finish(number).logits, logits)
        assert passes.waiting(number) is None
    passes.close()


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_walk_gives_the_plain_forwards_logits(name: str, limit: int) -> None:
    walk, expected = walked(made(name), name, limit=limit)
    passes = walk.passes("states")
    assert passes.begin() == -1
    for index in range(walk.loader.layers):
        for number in range(len(expected)):
            assert passes.waiting(number) == index
            first = passes.run(index, number)
            assert torch.equal(passes.run(index, number), first), "a layer that is run again gives the same"
            passes.go_on(index, number)
    assert passes.only_answers == (name in ONLY_ANSWERS)
    kept, away = passes.nbytes
    assert (away > 0) == (limit == 0)
    assert kept > 0
    finished(passes, expected)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_changed_layer_goes_its_own_way_beside(name: str) -> None:
    model = made(name)
    changed = copy.deepcopy(model)
    at = 1
    with torch.no_grad():
        for parameter in InMemory(changed).layer(at).parameters():
            parameter.mul_(1.2)
    own, other = InMemory(model), InMemory(changed).layer(at)
    walk, plain = walked(model, name)
    _, expected = walked(changed, name)
    assert not torch.equal(plain[0], expected[0])
    first = walk.passes("plain")
    first.begin()
    # Where the first layer hands on more than its answer, the way parts before it.
    second = None if name in ONLY_ANSWERS or model.config.is_encoder_decoder else first.parted("changed")
    go(first, 0, 0)
    if second is not None:
        with pytest.raises(UnsupportedModel, match="hands on more than hidden states"):
            first.parted("late")
        go(second, 0, 0)
    else:
        second = first.parted("changed")
    go(first, 1, own.layers - 1)
    finished(first, plain)
    walk.loader.units[at] = other  # type: ignore[attr-defined]
    go(second, 1, own.layers - 1)
    finished(second, expected)


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_later_run_goes_on_or_begins_anew(name: str, limit: int, tmp_path: Path) -> None:
    model = made(name)
    walk, expected = walked(model, name, folder=tmp_path, limit=limit)
    last = walk.loader.layers - 1
    passes = walk.passes("states", resumed=True)
    passes.begin()
    for index in range(last - 1):
        go(passes, index, index)
        passes.seal(index)
    passes.run(last - 1, 0)  # ended in the midst of a layer
    passes.go_on(last - 1, 0)
    passes.close()
    again = Walk(InMemory(model), batches(name, model), folder=tmp_path, limit=limit).passes("states", resumed=True)  # type: ignore[arg-type]
    done = again.begin(after=last - 2)
    # The last encoder layer's answer is all that the decoder needs.
    assert done == (-1 if name == "gemma4" else last - 2)
    for index in range(done + 1, last + 1):
        go(again, index, index)
        again.seal(index)
    finished(again, expected)
    end = walk.passes("states", resumed=True)
    assert end.begin(after=last) == (last if name in ONLY_ANSWERS else -1)
    go(end, 0, -1 if name in ONLY_ANSWERS else last)
    finished(end, expected)


@pytest.mark.parametrize("name", ["glm_moe_dsa", "deepseek_v4"])
def test_other_hidden_states_go_on(name: str) -> None:
    walk, expected = walked(made(name), name)
    passes = walk.passes("states")
    passes.begin()
    elsewhere = passes.run(0, 0, passes.get(0) * 0)
    made_there = passes.run(0, 0)
    assert not torch.equal(made_there, elsewhere)
    passes.put(0, elsewhere)
    assert torch.equal(passes.get(0), elsewhere)
    passes.put(0, made_there)
    passes.go_on(0, 0)
    assert torch.equal(passes.get(0), made_there)
    go_rest = [(1, 0), *[(0, number) for number in range(1, len(expected))]]
    for index, number in go_rest:
        passes.run(index, number)
        passes.go_on(index, number)
    passes.run(2, 0)
    passes.go_on(2, 0)
    passes.run(3, 0)
    assert torch.equal(passes.finish(0).logits, expected[0])
    passes.close()


def test_a_layer_that_fails_can_be_asked_again() -> None:
    model = made("glm_moe_dsa")
    walk, expected = walked(model, "glm_moe_dsa")
    passes = walk.passes("states")
    passes.begin()

    def fails(*_: Any) -> None:
        raise ValueError("no")

    handle = walk.loader.layer(0).mlp.register_forward_hook(fails)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            passes.run(0, 1)
    handle.remove()
    go(passes, 0, walk.loader.layers - 1)
    model.model.norm.register_forward_hook(fails)
    with pytest.raises(ValueError, match="no"):
        passes.finish(0)
    assert [type(layer).__name__ for layer in model.model.layers] == ["GlmMoeDsaDecoderLayer"] * 4
    passes.close()
    assert len(expected) == 3


def test_the_wrong_layer_is_refused() -> None:
    walk, _ = walked(made("hy_v4"), "hy_v4")
    passes = walk.passes("states")
    passes.begin()
    with pytest.raises(UnsupportedModel, match="comes to layer 0 where layer 1 was due"):
        passes.run(1, 0)
    passes.close()


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_closing_frees_all_that_passes_hold(limit: int) -> None:
    walk, _ = walked(made("gemma4"), "gemma4", limit=limit)
    passes = walk.passes("states")
    passes.begin()
    go(passes, 0, 1)
    held = [weakref.ref(tensor) for batch in passes._batches for tensor in batch.held()]
    in_memory = [sum(tensor.numel() for tensor in batch.held()) for batch in passes._batches]
    # The one that was worked on last is not parked; of others the tables are left that all share.
    assert (max(in_memory[:-1]) < 0.1 * in_memory[-1]) == (limit == 0)
    assert len(held) > 30
    passes.close()
    gc.collect()
    assert not [ref for ref in held if ref() is not None]


def test_outputs_that_a_config_collects_are_not_kept() -> None:
    model = build("qwen3_moe", output_router_logits=True)
    given = batches("qwen3_moe", model)
    walk = Walk(InMemory(model), given)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = [model(**walk.inputs(number)).logits for number in range(len(given))]
    passes = walk.passes("states")
    passes.begin()
    assert model.config.output_router_logits
    go(passes, 0, 1)
    assert passes.only_answers
    finished(passes, expected)
