"""Impossible conversions are refused before anything is computed, with the nearest legal value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moekit import catalogue
from moekit.conversion import ActivationSplit, Conversion, CopyUpcycling, RandomSplit, Residual, WeightSplit
from moekit.errors import BadConfig, BadData, UnsupportedModel


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        (RandomSplit(experts=5, top_k=2, router="zero"), "96 neurons .* do not divide among 5 experts"),
        (RandomSplit(experts=4, shared=3, router="zero", top_k=2), "93 neurons"),
        (RandomSplit(experts=4, shared=120, router="zero", top_k=2), "do not divide"),
        (RandomSplit(experts=4, top_k=5, router="zero"), "top_k 5 exceeds the 4 experts"),
        (RandomSplit(experts=4, top_k=2), "needs calibration text"),
        (ActivationSplit(experts=4, top_k=2, router="zero"), "needs calibration text"),
        (Residual(experts=4, top_k=2, router="clusters"), "needs calibration text"),
        (Residual(experts=4, top_k=2, width=104), "experts of 104 neurons cannot be taken from 96"),
        (Residual(experts=4, top_k=2, width=12), "12 neurons: the width must be a multiple of 8"),
        (RandomSplit(experts=8, top_k=2, shared=0, router="zero", layers=(0,)), "12 neurons"),
        (Residual(experts=4, top_k=2, layers=(3,)), r"layers \[3\] are not some of the model's 3"),
        (Residual(experts=4, top_k=2, layers=()), "are not some of"),
        (Residual(experts=4, top_k=2, layers=(1, 1)), "are not some of"),
        (CopyUpcycling(experts=4, target="mixtral", shared=True), "Mixtral has no shared expert"),
        (CopyUpcycling(experts=4, target="mixtral", layers=(0,)), "in Mixtral no layer stays dense"),
        (RandomSplit(experts=4, top_k=2, target="mixtral", normalised=False, router="zero"), "always normalises"),
    ],
)
def test_impossible_sizes(llama: PreTrainedModel, conversion: Conversion, message: str) -> None:
    with pytest.raises(BadConfig, match=message) as caught:
        conversion.convert(llama)
    assert caught.value.hint


def test_the_nearest_legal_number_of_experts_is_named(llama: PreTrainedModel) -> None:
    with pytest.raises(BadConfig) as caught:
        RandomSplit(experts=5, top_k=2, router="zero").convert(llama)
    assert caught.value.hint == "nearest numbers of experts: 3, 4, 6"


def test_unknown_fields_and_changes_are_refused() -> None:
    with pytest.raises(ValidationError):
        WeightSplit(exprts=4)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        WeightSplit().top_k = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        CopyUpcycling(top_k=0)


@pytest.mark.parametrize(
    ("calibration", "error"),
    [
        (torch.zeros(0, 8, dtype=torch.long), BadData),
        (torch.zeros(8, dtype=torch.long), BadData),
        (torch.zeros(2, 8), BadData),
        (torch.full((2, 8), 97), BadConfig),
        (torch.full((2, 8), -2), BadConfig),
        (torch.full((2, 8), -1), BadData),
    ],
)
def test_calibration_that_is_none(llama: PreTrainedModel, calibration: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        ActivationSplit(experts=4, top_k=2).convert(llama, calibration=calibration)


@pytest.mark.parametrize("family", ["gemma", "qwen3", "qwen2_moe"])
def test_other_families_are_named(family: str) -> None:
    config = AutoConfig.for_model(
        family, vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModel, match=f"{family!r} model cannot be turned") as caught:
        Residual().convert(model)
    assert "llama" in str(caught.value.hint)


def test_biases_without_a_place_are_named(build: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(UnsupportedModel, match=r"gate_proj\.bias has no place"):
        Residual().convert(build("llama", mlp_bias=True))
    with pytest.raises(UnsupportedModel, match=r"o_proj\.bias has no place"):
        Residual().convert(build("llama", attention_bias=True))
    with pytest.raises(UnsupportedModel, match="which Qwen2 has"):
        CopyUpcycling(target="mixtral").convert(build("qwen2"))
    with pytest.raises(UnsupportedModel, match="'gelu' is not silu"):
        Residual().convert(build("llama", hidden_act="gelu"))


def test_a_model_that_is_not_loaded_is_named(llama: PreTrainedModel) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama.config)
    with pytest.raises(UnsupportedModel, match="is not loaded"):
        Residual().convert(model)


def test_the_catalogue_knows_every_conversion() -> None:
    records = {record.name: record for record in catalogue.methods("convert")}
    assert {"activation", "copy", "random", "residual", "weights"} <= set(records)
    for record in records.values():
        assert record.stock
        assert record.limits
        assert record.summary
