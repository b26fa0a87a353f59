"""Multimodal models are opened as what they are: every tensor stays, and the language part alone is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import moekit
from moekit.anatomy import find_moe_layers
from moekit.checking import check
from moekit.checkpoint.decoder import decoder_of, stack_of
from moekit.checkpoint.expected import verify
from moekit.checkpoint.experts import counts_of
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import text_config
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.streaming.loader import LayerLoader
from tests.families import EXPERTS, VOCAB
from tests.odd_folders import nudge, tensors_of
from tests.wrappers import (
    DENSE_FIRST,
    LAYERS,
    TOWERS,
    WRAPPERS,
    build_wrapper,
    save_wrapper,
)

KEEP = (0, 2, 3, 5)
IDS = torch.arange(3, 21)[None] % VOCAB
OF_MEMORY = {"dtype", "transformers_version"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's folder; nobody writes into them."""
    root = tmp_path_factory.mktemp("wrappers")
    return {family: save_wrapper(root / family, family) for family in WRAPPERS}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=IDS).logits
    return made


def stock(folder: Path, family: str) -> PreTrainedModel:
    """The folder in the class that published folders of the family name; nothing missing, nothing left over."""
    model, told = getattr(transformers, WRAPPERS[family][0]).from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    opened: PreTrainedModel = model
    return opened


def moe_layers(family: str) -> list[int]:
    return [1] if family in DENSE_FIRST else list(range(LAYERS))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key not in OF_MEMORY}


def sliced(family: str) -> PreTrainedModel:
    """The family's model with fewer experts, cut by hand: stacks and routers of a model built with so many."""
    whole = build_wrapper(family)
    text = whole.config.get_text_config()
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if isinstance(vars(text).get(key), int):
            setattr(text, key, len(KEEP))
    small: PreTrainedModel = type(whole)(whole.config).float().eval()
    target = small.state_dict()
    with torch.no_grad():
        for name, tensor in whole.state_dict().items():
            own = target[name]
            axes = [n for n, (a, b) in enumerate(zip(tensor.shape, own.shape, strict=True)) if a != b]
            assert all(tensor.shape[n] == EXPERTS for n in axes)
            own.copy_(tensor.index_select(axes[0], torch.tensor(KEEP)) if axes else tensor)
    return small


# One of each kind of tower and experts; the others are tried by `make test-all`.
QUICK = ("aria", "llama4", "qwen3_vl_moe")
TRIED = [
    pytest.param(name, marks=() if name in QUICK else (pytest.mark.full, pytest.mark.slow)) for name in sorted(WRAPPERS)
]


@pytest.mark.parametrize("family", TRIED)
class TestWrapper:
    def test_it_is_opened_as_what_it_is(self, family: str, folders: dict[str, Path]) -> None:
        checkpoint = Checkpoint.open(folders[family])
        verify(checkpoint)
        assert counts_of(checkpoint) == dict.fromkeys(moe_layers(family), EXPERTS)
        assert text_config(checkpoint.config)["num_hidden_layers"] == LAYERS
        model = moekit.load(folders[family], device="cpu")
        assert type(model).__name__ == WRAPPERS[family][0]
        assert [layer.index for layer in find_moe_layers(model)] == moe_layers(family)
        torch.testing.assert_close(logits(model), logits(stock(folders[family], family)), rtol=0, atol=0)

    def test_saving_keeps_every_byte(self, family: str, folders: dict[str, Path], tmp_path: Path) -> None:
        model = moekit.load(folders[family], device="cpu")
        nudge(model, lambda name: name.endswith("experts.down_proj"))
        moekit.save(model, tmp_path / "out")
        before, after = tensors_of(folders[family]), tensors_of(tmp_path / "out")
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        layout = Checkpoint.open(folders[family]).layout
        assert before.keys() == after.keys()
        assert changed
        assert all(layout.is_expert(name) for name in changed)
        if family in TOWERS:
            assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"patch_size": 4}'
            assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
        torch.testing.assert_close(logits(stock(tmp_path / "out", family)), logits(model), rtol=0, atol=5e-6)

    def test_layers_are_loaded_without_towers(self, family: str, folders: dict[str, Path]) -> None:
        loader = LayerLoader(Checkpoint.open(folders[family]), device="cpu")
        loader.load_rest()
        for index in range(loader.layers):
            loader.load(index)
        empty = {name for name, parameter in loader.model.named_parameters() if parameter.is_meta}
        assert bool(empty) is (family in TOWERS)
        torch.testing.assert_close(logits(loader.model), logits(stock(folders[family], family)), rtol=0, atol=5e-6)
        loader.load_rest(towers=True)
        assert not any(parameter.is_meta for parameter in loader.model.parameters())
        loader.release_rest()
        inside = {id(parameter) for parameter in stack_of(decoder_of(loader.model)).parameters()}
        assert {id(p) for p in loader.model.parameters() if not p.is_meta} == inside
        loader.close()

    def test_experts_go_in_memory(self, family: str, folders: dict[str, Path], tmp_path: Path) -> None:
        model = moekit.load(folders[family], device="cpu")
        change_model(model, dict.fromkeys(moe_layers(family), LayerOutcome(keep=KEEP)))
        torch.testing.assert_close(logits(model), logits(sliced(family)), rtol=0, atol=5e-6)
        moekit.save(model, tmp_path / "out")
        torch.testing.assert_close(logits(stock(tmp_path / "out", family)), logits(model), rtol=0, atol=5e-6)
        assert check(tmp_path / "out").ok

    def test_experts_go_on_disk(self, family: str, folders: dict[str, Path], tmp_path: Path) -> None:
        source = Checkpoint.open(folders[family])
        record = Record(command="a test", parent=str(folders[family]))
        apply(source, dict.fromkeys(moe_layers(family), LayerOutcome(keep=KEEP)), tmp_path / "out", record=record)
        torch.testing.assert_close(logits(stock(tmp_path / "out", family)), logits(sliced(family)), rtol=0, atol=5e-6)
        assert check(tmp_path / "out", parent=folders[family]).ok
        assert counts_of(Checkpoint.open(tmp_path / "out")) == dict.fromkeys(moe_layers(family), len(KEEP))
        before, after = config_of(folders[family]), config_of(tmp_path / "out")
        assert {key for key in before | after if before.get(key) != after.get(key)} <= {
            "text_config" if family in TOWERS else "n_routed_experts"
        }
        assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("family", [case for case in TRIED if case.values[0] not in DENSE_FIRST])
def test_layers_may_differ(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = moekit.load(folders[family], device="cpu")
    change_model(model, {0: LayerOutcome(keep=KEEP), 1: LayerOutcome(keep=tuple(range(EXPERTS)))})
    moekit.save(model, tmp_path / "out")
    again = moekit.load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=5e-6)
    assert tensors_of(tmp_path / "out").keys() <= tensors_of(folders[family]).keys()


@pytest.mark.parametrize("family", ["gemma4", "aria", "kimi_k25", "step3p7", "minimax_m3_vl", "mistral3"])
def test_a_tower_that_numbers_its_layers_too_is_no_decoder(family: str, folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(folders[family])
    model = build_wrapper(family)
    decoder = {id(tensor) for tensor in decoder_of(model).state_dict(keep_vars=True).values()}
    inside = {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in decoder}
    for name in checkpoint.tensors:
        layer = checkpoint.where(name)[0]
        assert layer is None or (checkpoint.layout.live_name(name) in inside and layer < LAYERS), name
    towers = [name for name in checkpoint.tensors if checkpoint.layout.live_name(name) not in inside]
    assert any(f".{LAYERS}." in name for name in towers)
