"""Every family's gate is found by asking the router, and equals it bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moekit.anatomy import Gate, find_moe_layers, identify_gate
from moekit.anatomy.gate import GateSpec, sparsemixer_weights
from moekit.errors import UnsupportedModel
from tests.families import FAMILIES, build

SELECTION_BIAS = {"deepseek_v3", "glm4_moe", "ernie4_5_moe"}
GROUPED = {"deepseek_v2", "deepseek_v3", "glm4_moe"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_equals_the_router_on_new_rows(family: str, dtype: torch.dtype) -> None:
    model = build(family).to(dtype)
    layer = find_moe_layers(model)[-1]
    spec = identify_gate(layer)
    assert bool(spec.bias) == (family in SELECTION_BIAS)
    assert (spec.groups > 1) == (family in GROUPED)
    router = layer.require_router()
    hidden = torch.randn(2000, layer.geometry.hidden, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        logits, weights, indices = router(hidden)
        ours, chosen = Gate(spec, router)(logits)
    assert torch.equal(chosen, indices)
    assert torch.equal(ours.to(weights.dtype), weights)


def test_zero_routers_are_told_apart_all_the_same() -> None:
    model = build("qwen2_moe")
    layer = find_moe_layers(model)[0]
    nn.init.zeros_(layer.require_router().weight)
    assert identify_gate(layer) == GateSpec(2, "softmax", normalise=False)
    assert bool((layer.require_router().weight == 0).all())


class Cosine(nn.Module):
    """A router by contract whose gate is none of the known ones."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.normalize(hidden_states, dim=-1) @ nn.functional.normalize(self.weight, dim=-1).T
        values, indices = logits.cos().topk(2, dim=-1)
        return logits, values.square(), indices


def test_an_unknown_gate_is_refused_by_name() -> None:
    model = build("qwen2_moe")
    layer = find_moe_layers(model)[1]
    layer.block.gate = Cosine(8, 32)
    (layer,) = [found for found in find_moe_layers(model) if found.index == layer.index]
    with pytest.raises(UnsupportedModel, match="Cosine") as caught:
        identify_gate(layer)
    assert caught.value.layer == 1


def test_sparsemixer_by_hand() -> None:
    # jitter 0.1: the first choice (2.0) leaves out logits with (2 - z)/max(|z|, 2) > 0.2, so 1.7 stays and 1.0 goes;
    # the second choice is weighed among what is left: 1.7 and, relative to 1.7, 1.5.
    logits = torch.tensor([[2.0, 1.7, 1.0, 1.5]])
    weights = sparsemixer_weights(logits, torch.tensor([[0, 1]]), jitter=0.1)
    first = torch.tensor([2.0, 1.7]).softmax(0)[0]
    second = torch.tensor([1.7, 1.5]).softmax(0)[0]
    torch.testing.assert_close(weights[0], torch.stack([first, second]))
