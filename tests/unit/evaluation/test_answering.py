"""A fault of transformers is told apart from ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.errors import UnsupportedModel
from moekit.family import build, family
from moekit.runtime.answering import telling_its_own_faults


def test_what_breaks_off_in_transformers_is_named_as_such() -> None:
    model, ids = build(family("mixtral")), torch.tensor([[5, 6, 7]])
    with telling_its_own_faults(model):
        assert model(input_ids=ids).logits.shape[:2] == (1, 3)
    del model.model.norm.variance_epsilon  # which its own forward pass reads
    with (
        pytest.raises(UnsupportedModel, match=r"transformers [\d.]+ breaks off in its own MixtralForCausalLM"),
        telling_its_own_faults(model),
    ):
        model(input_ids=ids)


def test_our_own_faults_stay_what_they_are() -> None:
    model = build(family("mixtral"))

    def broken(x_BSH: Tensor) -> Tensor:
        raise AttributeError("ours")

    model.model.norm.forward = broken
    with pytest.raises(AttributeError, match="ours"), telling_its_own_faults(model):
        model(input_ids=torch.tensor([[5, 6, 7]]))
