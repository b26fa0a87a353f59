"""Statistics of several texts out of one pass against a pass for each; only the layers asked for; after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.checkpoint.folder import Checkpoint
from moekit.compress.prune.easy_ep import EasyEP
from moekit.compress.prune.premoe import PreMoe
from moekit.errors import BadConfig, BadData
from moekit.serving.expert_sets.recording import GroupedText
from moekit.serving.expert_sets.retrieval import queries_from_disk
from moekit.streaming.loader import LayerLoader
from moekit.trace import record
from moekit.trace.streamed import record_streamed
from tests.checkpoints import plain
from tests.expert_sets import query
from tests.families import build, tokens
from tests.tiny import tokenizer

NAMES = ("load", *PreMoe().required, *EasyEP().required)
TEXTS: dict[str, list[Any]] = {
    "maths": [tokens(4, 24, seed=1), tokens(1, 9, seed=2)],
    "code": [tokens(3, 16, seed=3)],
}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_each_text_is_counted_as_if_it_were_alone(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", family))
    found = GroupedText(checkpoint, TEXTS, statistics=NAMES).run()
    for name, text in TEXTS.items():
        alone = record_streamed(checkpoint, text, statistics=NAMES).require(NAMES)
        assert list(found[name]) == list(alone)
        for layer, statistics in alone.items():
            assert found[name][layer].tokens == statistics.tokens
            for statistic, tensor in statistics.items():
                assert torch.equal(found[name][layer][statistic], tensor), statistic


class Killed(Exception):
    pass


def killing(after: int) -> Callable[..., Any]:
    """`LayerLoader.load` that dies when it is asked once too often."""
    stock, left = LayerLoader.load, [after]

    def load(self: LayerLoader, index: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return stock(self, index)

    return load


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_that_was_killed_goes_on(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "deepseek_v3"))
    whole = GroupedText(checkpoint, TEXTS, statistics=NAMES).run()
    with monkeypatch.context() as patch:
        patch.setattr(LayerLoader, "load", killing(after))
        with pytest.raises(Killed):
            GroupedText(checkpoint, TEXTS, statistics=NAMES, folder=tmp_path / "work").run()
    with monkeypatch.context() as patch:
        patch.setattr(LayerLoader, "load", killing(3 - after))
        again = GroupedText(checkpoint, TEXTS, statistics=NAMES, folder=tmp_path / "work").run()
    for name, layers in whole.items():
        for layer, statistics in layers.items():
            assert again[name][layer].tokens == statistics.tokens
            assert all(torch.equal(again[name][layer][s], t) for s, t in statistics.items())


@pytest.mark.parametrize("change", ["text", "domain", "statistics", "layers"])
def test_work_on_something_else_starts_over(change: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    options: dict[str, Any] = {"statistics": NAMES, "folder": tmp_path / "work", "layers": 1}
    GroupedText(checkpoint, TEXTS, **options).run()
    texts = {"maths": TEXTS["code"], "code": TEXTS["maths"]} if change == "text" else TEXTS
    texts = {"maths": TEXTS["maths"], "law": TEXTS["code"]} if change == "domain" else texts
    options |= {"statistics": {"statistics": ("load",)}, "layers": {"layers": 2}}.get(change, {})
    again = GroupedText(checkpoint, texts, **options).run()
    fresh = GroupedText(checkpoint, texts, **(options | {"folder": None})).run()
    for name, layers in fresh.items():
        assert list(again[name]) == list(layers)
        for layer, statistics in layers.items():
            assert all(torch.equal(again[name][layer][s], t) for s, t in statistics.items())


@pytest.mark.parametrize(("family", "layers"), [("qwen3_moe", 1), ("deepseek_v3", 1), ("deepseek_v3", 2)])
def test_prompts_are_scored_as_in_memory_from_the_first_layers_alone(
    family: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", family, num_hidden_layers=5))
    model = build(family, num_hidden_layers=5)
    loaded: list[int] = []
    stock = LayerLoader.load

    def load(self: LayerLoader, index: int) -> Any:
        loaded.append(index)
        return stock(self, index)

    monkeypatch.setattr(LayerLoader, "load", load)
    prompts = [tokenizer()(text)["input_ids"] for text in ("the old mill", "12 + 7 = 19; 81 / 9")]
    found = queries_from_disk(checkpoint, prompts, method=PreMoe(), layers=layers)
    dense = 1 if family == "deepseek_v3" else 0
    assert loaded == list(range(dense + layers))
    for ids, scores in zip(prompts, found, strict=True):
        expected = query(model, ids, method=PreMoe(), layers=layers)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    for layers in (0, 3):
        with pytest.raises(BadConfig, match="2 MoE layers"):
            GroupedText(checkpoint, TEXTS, statistics=("load",), layers=layers)
    for texts in ({"maths": TEXTS["maths"], "code": []}, {"maths": [torch.zeros(0, 4, dtype=torch.int64)]}):
        with pytest.raises(BadData):
            GroupedText(checkpoint, texts, statistics=("load",))
    for prompts in ([], [[]], [[5], []]):
        with pytest.raises(BadData):
            queries_from_disk(checkpoint, prompts, method=PreMoe())


def test_a_trace_without_the_load_makes_no_expert_set() -> None:
    from moekit.serving.expert_sets.scoring import expert_set_of

    model = build("qwen3_moe")
    names = [name for name in PreMoe().required if name != "load"]
    trace = record(model, [tokens()], statistics=names, keep_choices=False)
    with pytest.raises(BadData, match="load"):
        expert_set_of("text", model, trace, PreMoe())
