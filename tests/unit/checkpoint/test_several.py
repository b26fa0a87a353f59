"""A class that only holds models is run as the one of them that writes text, and stays what it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import nn

import moekit
from moekit.anatomy import find_moe_layers
from moekit.checking import check
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.architecture import architecture_of, class_name
from moekit.checkpoint.record import Record
from moekit.checkpoint.several import run_as_part, writer_of, writing_part
from moekit.compress.engine.apply import apply
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import UnsupportedModel
from moekit.evaluation.generation import complete
from moekit.family import family, tokenizer, write
from moekit.family.rules import EXPERTS, LAYERS
from moekit.trace import record, record_generation
from moekit.trace.streamed import record_streamed
from tests.odd_folders import tensors_of

IDS = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(0))
KEEP = (0, 2, 3, 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(family("qwen3_omni_moe"), tmp_path_factory.mktemp("omni") / "model")


@pytest.fixture(scope="module")
def thinker(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The thinker as users save it: by its own class, out of the whole folder."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    stock(whole).thinker.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def stock(folder: Path) -> Any:
    kind = transformers.Qwen3OmniMoeForConditionalGeneration
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def moved(state: dict[str, torch.Tensor], kept: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors of the thinker's routed experts and routers, by plain indexing; all others as they are."""
    ours = [name for name in state if name.startswith("thinker.model.") and ".mlp." in name and "audio" not in name]
    routed = {name for name in ours if ".experts." in name or name.endswith(".gate.weight")}
    return {name: tensor[list(kept)] if name in routed else tensor for name, tensor in state.items()}


@torch.no_grad()
def test_the_whole_answers_as_its_thinker(whole: Path) -> None:
    model = moekit.load(whole, device="cpu")
    assert isinstance(model, transformers.Qwen3OmniMoeForConditionalGeneration)
    assert type(model).__name__ == class_name(model) == "Qwen3OmniMoeForConditionalGeneration"
    expected = stock(whole).thinker(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    assert model.get_input_embeddings() is model.thinker.get_input_embeddings()
    assert model.get_output_embeddings() is model.thinker.lm_head


def test_the_whole_is_saved_as_it_was(whole: Path, tmp_path: Path) -> None:
    moekit.save(moekit.load(whole, device="cpu"), tmp_path / "out")
    before, after = tensors_of(whole), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(stock(tmp_path / "out")).__name__ == "Qwen3OmniMoeForConditionalGeneration"


def test_only_the_thinkers_experts_are_found(whole: Path) -> None:
    layers = find_moe_layers(moekit.load(whole, device="cpu"))
    assert [layer.index for layer in layers] == list(range(LAYERS))
    assert all(layer.name.startswith("thinker.model.") for layer in layers)


@torch.no_grad()
def test_only_the_thinker_is_pruned(whole: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(whole)
    apply(source, dict.fromkeys(range(LAYERS), LayerOutcome(keep=KEEP)), tmp_path / "small", record=Record(command="x"))
    before, after = stock(whole), stock(tmp_path / "small")
    config = after.config
    assert config.thinker_config.text_config.num_experts == len(KEEP)
    assert config.talker_config.text_config.num_local_experts == EXPERTS
    expected, found = moved(before.state_dict(), KEEP), after.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    assert sum(expected[name].shape != tensor.shape for name, tensor in before.state_dict().items()) == 3 * LAYERS
    assert check(tmp_path / "small", parent=whole).ok


def test_streamed_and_live_traces_agree(whole: Path) -> None:
    streamed = record_streamed(Checkpoint.open(whole), [IDS], keep_choices=True, device="cpu")
    live = record(moekit.load(whole, device="cpu"), [IDS])
    assert all(torch.equal(streamed.indices(layer), live.indices(layer)) for layer in live.meta.layers)


def test_text_is_written_by_the_thinker(whole: Path) -> None:
    model, text = moekit.load(whole, device="cpu"), tokenizer()
    assert writer_of(model) is model.thinker
    [told] = complete(model, text, ["the river"], max_new_tokens=5).completions
    given = torch.tensor([told.prompt_ids])
    made = stock(whole).thinker.generate(input_ids=given, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert list(told.ids) == made[0, given.shape[1] :].tolist()
    trace, written = record_generation(model, [list(told.prompt_ids)], max_new_tokens=5)
    assert written == [list(told.ids)]
    assert trace.meta.tokens == given.shape[1] + len(told.ids) - 1


@torch.no_grad()
def test_a_thinker_saved_alone_says_what_its_class_asks_for(thinker: Path, whole: Path) -> None:
    model = moekit.load(thinker, device="cpu")
    expected = stock(whole).thinker(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    trace = record_streamed(Checkpoint.open(thinker), [IDS], device="cpu")
    assert trace.meta.tokens == IDS.numel()


class OneConfig(transformers.PreTrainedConfig):
    model_type = "one_of_a_test"
    hidden_size: int = 4


class TwoConfig(transformers.PreTrainedConfig):
    model_type = "two_of_a_test"
    sub_configs: ClassVar = {"first_config": OneConfig, "second_config": OneConfig}


class Two(transformers.PreTrainedModel):
    config_class = TwoConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)
        self.post_init()


def two(text: str | None) -> Any:
    """A config of two models; which of them is the language model's."""
    config = TwoConfig()
    config.first_config, config.second_config = OneConfig(), OneConfig()
    if text is not None:
        config.get_text_config = lambda decoder=None, encoder=None: getattr(config, text)
    return config


def test_which_part_writes_is_told_by_the_config() -> None:
    assert writing_part(two(None)) is None
    assert writing_part(two("second_config")) == "second_config"
    assert writing_part(transformers.Qwen3OmniMoeConfig()) == "thinker_config"
    assert writing_part(transformers.MixtralConfig()) is None


def test_models_that_run_are_left_alone() -> None:
    model = transformers.MixtralForCausalLM._from_config(
        transformers.MixtralConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, num_local_experts=2,
        )
    )  # fmt: skip
    assert run_as_part(model) is model
    assert type(model) is transformers.MixtralForCausalLM
    assert writer_of(model) is model


def test_several_models_of_which_none_is_told_to_write_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Two, "can_generate", classmethod(lambda kind: True))
    monkeypatch.setattr(sys.modules["transformers"], "Two", Two, raising=False)
    config = two(None)
    config.architectures = ["Two"]
    with pytest.raises(UnsupportedModel, match=r"Two is several models \(first, second\).* which of them writes text"):
        architecture_of(config)
