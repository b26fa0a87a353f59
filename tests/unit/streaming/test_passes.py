"""Paused passes against plain forwards, for models whose layers hand on all kinds of things."""

from __future__ import annotations

import pytest
import torch
from typing import Any

from moekit.streaming.walk import Walk
from tests.unit.streaming.handing import MODELS, ONLY_ANSWERS, InMemory, batches, made


def walked(model: Any, name: str, **options: Any) -> tuple[Walk, Any, list[Any]]:
    loader: Any = InMemory(model)
    given = batches(name, model)
    walk = Walk(loader, given, **options)
    with torch.no_grad():
        expected = [model(**walk.inputs(number)).logits for number in range(len(given))]
    return walk, walk.passes("states"), expected


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_walk_gives_the_plain_forwards_logits(name: str, limit: int) -> None:
    walk, passes, expected = walked(made(name), name, limit=limit)
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
    for number, logits in enumerate(expected):
        assert torch.equal(passes.finish(number).logits, logits)
        assert passes.waiting(number) is None
    passes.close()
