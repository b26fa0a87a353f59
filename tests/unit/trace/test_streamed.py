"""Recording layer by layer from disk gives the trace that recording the whole model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.checkpoint.folder import Checkpoint
from moekit.errors import BadConfig, BadData, UnsupportedModel
from moekit.trace import Trace, layer_hook, record
from moekit.trace.streamed import Streamed, record_streamed
from tests.checkpoints import plain
from tests.families import FAMILIES, build, tokens

IDS = tokens(2, 12, seed=3)
MASK = torch.ones_like(IDS)
MASK[1, 9:] = 0
BATCHES: list[Any] = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": tokens(3, 7, seed=4)}]
GROUPS = ("basic", "gates", "router", "inputs", "inner", "outputs", "residual")


def checkpoint(folder: Path, family: str) -> Checkpoint:
    return Checkpoint.open(plain(folder, family))


def same(first: Trace, second: Trace) -> None:
    left, right = first.tensors(), second.tensors()
    assert set(left) == set(right)
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = first.meta.model_dump(), second.meta.model_dump()
    for key in ("layers", "experts", "top_k", "hidden", "widths", "tokens", "domains", "statistics", "fingerprint"):
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_streamed_is_recorded_whole(family: str, tmp_path: Path) -> None:
    whole = record(build(family), BATCHES, statistics=GROUPS, keep_choices=True, weights=True)
    streamed = record_streamed(
        checkpoint(tmp_path / "m", family), BATCHES, statistics=GROUPS, keep_choices=True, weights=True
    )
    same(streamed, whole)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_interrupted_run_goes_on_where_it_was(layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = checkpoint(tmp_path / "m", "deepseek_v3")
    settings: dict[str, Any] = {"statistics": GROUPS, "keep_choices": True}
    expected = record_streamed(opened, BATCHES, **settings)
    own, ran = Streamed._layer, []

    def dies(self: Streamed, index: int, *states: Any) -> None:
        own(self, index, *states)
        if index == layer:
            raise _Killed

    monkeypatch.setattr(Streamed, "_layer", dies)
    with pytest.raises(_Killed):
        record_streamed(opened, BATCHES, folder=tmp_path / "scratch", **settings)

    def counts(self: Streamed, index: int, *states: Any) -> None:
        ran.append(index)
        own(self, index, *states)

    monkeypatch.setattr(Streamed, "_layer", counts)
    same(record_streamed(opened, BATCHES, folder=tmp_path / "scratch", **settings), expected)
    assert ran == list(range(layer, 3))
    ran.clear()
    other = record_streamed(opened, BATCHES[:1], folder=tmp_path / "scratch", **settings)
    assert ran == [0, 1, 2], "another text must not take up the old work"
    assert other.meta.tokens == int(MASK.sum())


def test_what_cannot_be_walked_is_refused_first(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path / "m", "mixtral")
    with pytest.raises(BadData, match="padding"):
        record_streamed(opened, [{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}])
    with pytest.raises(BadConfig, match="embeddings"):
        record_streamed(opened, [torch.full((1, 4), 5000)])


def test_a_layer_that_refuses_to_be_seen_keeps_no_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise UnsupportedModel("its experts are called in another way")

    monkeypatch.setattr(layer_hook, "lay", refuse)
    with Streamed(checkpoint(tmp_path / "m", "qwen2_moe"), BATCHES, statistics=GROUPS) as streamed:
        with pytest.raises(UnsupportedModel, match="called in another way"):
            streamed.run()
        modules = list(streamed.loader.model.modules())
    assert [m for m in modules if m._forward_hooks or m._forward_pre_hooks] == []
