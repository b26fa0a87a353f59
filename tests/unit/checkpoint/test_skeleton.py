"""A model without weights is, but for them, the model that transformers builds."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.checkpoint.skeleton import empty_model
from tests.families import FAMILIES


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_but_the_weights_is_there(family: str, tied: bool) -> None:
    config = FAMILIES[family]()
    config.tie_word_embeddings = tied
    empty, stock = empty_model(config), AutoModelForCausalLM.from_config(config)
    for own, other in ((empty.named_parameters(), stock.named_parameters()),):
        found = {name: (p.shape, p.dtype, p.requires_grad) for name, p in own}
        assert found == {name: (p.shape, p.dtype, p.requires_grad) for name, p in other}
    assert all(parameter.is_meta for parameter in empty.parameters())
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(stock.named_buffers()).keys()
    for name, buffer in stock.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    alike = empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
    assert alike == (stock.get_output_embeddings().weight is stock.get_input_embeddings().weight)
    assert list(empty.state_dict()) == list(stock.state_dict())
    assert not empty.training
