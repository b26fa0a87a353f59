"""The shared tiny models must be what the other tests take them for."""

import pytest
import torch

from tests.families import EXPERTS, FAMILIES, build, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_random_finite_and_repeatable(family):
    model, again, other = build(family), build(family), build(family, seed=1)
    first = logits(model)
    assert torch.isfinite(first).all()
    assert torch.equal(first, logits(again))
    assert not torch.allclose(first, logits(other))
    for name, tensor in model.state_dict().items():
        assert tensor.float().std() > 0, f"{name} is constant"
    assert any(p.dim() == 3 and p.shape[0] == EXPERTS for p in model.parameters())


def test_overrides_reach_the_config():
    model = build("qwen3_moe", num_experts=16, num_experts_per_tok=4, num_hidden_layers=3)
    assert model.model.layers[2].mlp.experts.down_proj.shape[0] == 16
