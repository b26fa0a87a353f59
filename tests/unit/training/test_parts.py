"""Training a model whose parts learn: seen by its parts option, resumed, refused where ranks could not keep it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.data.batches import TokenBatches
from moekit.errors import BadConfig
from moekit.parallel.checkpoints.sharded import save_sharded
from moekit.runtime import attach
from moekit.runtime.tracker import tracker_of
from moekit.training import TrainConfig, train
from tests.families import build, tokens
from tests.parts import Nudge, NullExperts, learned


def text() -> TokenBatches:
    ids = tokens(8, 16)
    return TokenBatches(ids, torch.zeros_like(ids), torch.zeros_like(ids), ("a",))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_router_part_trains_it_alone(checkpointed: bool) -> None:
    model = build("qwen3_moe")
    attach(model, NullExperts())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(
        steps=2, batch=2, seq_len=16, lr=1e-2, parts=("router",), balance_coef=0, activation_checkpointing=checkpointed
    )
    train(model, None, text(), config)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert learned(model).keys() <= moved
    assert all("gate" in name for name in moved)
    tracker = tracker_of(model)
    assert tracker is not None
    assert (tracker.step, tracker.steps) == (1, 2)
    assert {name for _, name in tracker.losses} == {"NullExperts.balance"}


def test_pieces_of_ranks_do_not_lose_it_in_silence(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    attach(model, Nudge())
    with pytest.raises(BadConfig, match="no checkpoint in pieces keeps"):
        save_sharded(model, tmp_path / "m")
