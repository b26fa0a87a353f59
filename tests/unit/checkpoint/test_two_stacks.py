"""Layers of an encoder and of its decoder are numbered through, whatever their lists are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from moekit.checkpoint.architecture import architecture_of
from moekit.checkpoint.decoder import layer_number, layers_of, stacks_of
from moekit.checkpoint.layout import layout_of
from moekit.checkpoint.names import stated_depth, where
from tests.families import build
from tests.unit.streaming.handing import MODELS

# Family -> its lists, as many layers as `handing` gives them; experts hang in the last of each.
LISTS = {
    "switch_transformers": ("encoder.block.", "decoder.block."),
    "nllb_moe": ("model.encoder.layers.", "model.decoder.layers."),
}
INSIDE = {
    "switch_transformers": ("layer.1.mlp.experts.expert_3.wi.weight", "layer.2.mlp.experts.expert_3.wi.weight"),
    "nllb_moe": ("ffn.experts.expert_3.fc1.bias", "ffn.experts.expert_3.fc1.bias"),
}


@pytest.fixture(params=sorted(LISTS))
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    name: str = request.param
    return name, MODELS[name]()


def test_the_decoders_numbers_follow_the_encoders(family: tuple[str, Any]) -> None:
    name, model = family
    stacks = stacks_of(model)
    assert tuple(stack.prefix for stack in stacks) == LISTS[name]
    assert [(stack.first, stack.layers) for stack in stacks] == [(0, 3), (3, 2)]
    assert [layer_number(stacks, f"{prefix}1.x") for prefix in LISTS[name]] == [1, 4]
    assert layer_number(stacks, "lm_head.weight") is None
    inside = dict(model.named_modules())
    assert layers_of(model) == [inside[f"{p}{n}"] for p, count in zip(LISTS[name], (3, 2), strict=True)
                                for n in range(count)]  # fmt: skip


def test_a_layout_says_which_layer_and_expert_a_tensor_is_of(family: tuple[str, Any]) -> None:
    name, model = family
    layout = layout_of(model)
    first, second = (
        f"{prefix}{at}.{inside}" for prefix, at, inside in zip(LISTS[name], ("1", "1"), INSIDE[name], strict=True)
    )
    assert layout.where(first) == (1, 3)
    assert layout.where(second) == (4, 3)
    assert first in layout.stock
    assert second in layout.stock
    assert layout.is_expert(first)
    assert layout.is_expert(second)
    router = f"{first.partition('experts.')[0]}router.classifier.weight"
    assert layout.where(router) == (1, None)
    assert not layout.is_expert(router)
    assert layout.where(next(n for n in layout.stock if "embed" in n or "shared" in n)) == (None, None)


def test_a_name_alone_does_not_tell_which_stacks_number_it_has() -> None:
    assert where("model.decoder.layers.3.ffn.experts.expert_7.fc1.weight") == (None, 7)
    assert where("model.layers.3.mlp.experts.7.up_proj.weight") == (3, 7)


def test_no_layers_of_multi_token_prediction_follow_a_decoder_with_an_encoder() -> None:
    assert stated_depth({"model_type": "nllb-moe", "num_hidden_layers": 2, "is_encoder_decoder": True}) is None
    assert stated_depth({"model_type": "mixtral", "num_hidden_layers": 2}) == 2


def test_a_model_that_only_writes_has_one_stack() -> None:
    (stack,) = stacks_of(build("mixtral"))
    assert (stack.prefix, stack.first, stack.layers) == ("model.layers.", 0, 2)


def test_the_class_is_the_one_that_the_config_names_or_the_one_of_the_table() -> None:
    kind = transformers.SwitchTransformersForConditionalGeneration
    named = transformers.SwitchTransformersConfig(architectures=[kind.__name__])
    assert architecture_of(named).kind is kind
    unnamed = architecture_of(transformers.SwitchTransformersConfig())
    assert unnamed.kind is kind
    with torch.device("meta"):
        assert type(unnamed.build(_tiny())) is kind


def _tiny() -> transformers.SwitchTransformersConfig:
    return transformers.SwitchTransformersConfig(
        vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2
    )
