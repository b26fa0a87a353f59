"""Families that keep, choose or call their experts otherwise than most are found for what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit.anatomy import Gate, find_moe_layers, identify_gate, permute_experts
from moekit.anatomy.storage import expert_of
from moekit.anatomy.stored import find_storage
from moekit.errors import UnsupportedModel
from tests.families import EXPERTS, HIDDEN, TOP_K, WIDTH, logits
from tests.odd_families import build, config_of

BIASED = {
    "afmoe": "expert_bias",
    "hy_v3": "e_score_correction_bias",
    "lfm2_moe": "expert_bias",
    "minimax_m2": "e_score_correction_bias",
}
# family -> how experts lie, where choices are read, rows that the router scores (0: no module tells), transposed
FOUND: dict[str, tuple[str, str, int, bool]] = {
    **dict.fromkeys(BIASED, ("stacked", "experts", EXPERTS, False)),
    "llama4_text": ("stacked", "scores", EXPERTS, True),
    "aria_text": ("stacked", "experts", EXPERTS, True),
    "inkling2_text": ("stacked", "experts", EXPERTS, False),
    "inkling_text": ("stacked", "experts", EXPERTS, False),
    "zaya": ("stacked", "experts", EXPERTS + 1, False),
    "longcat_flash": ("stacked", "experts", EXPERTS + 3, False),
    "jetmoe": ("paired", "sorted", EXPERTS, False),
    "dbrx": ("joined", "experts", 0, True),
    "deepseek_v4": ("stacked", "experts", 0, False),
}
CONTRACT = {*BIASED, "aria_text", "inkling2_text"}


@pytest.mark.parametrize("family", sorted(FOUND))
@pytest.mark.parametrize("meta", [False, True])
def test_blocks_are_found_for_what_they_are(family: str, meta: bool) -> None:
    with torch.device("meta" if meta else "cpu"):
        model = AutoModelForCausalLM.from_config(config_of(family))
    layer = find_moe_layers(model)[0]
    kind, seam, scored, transposed = FOUND[family]
    assert (layer.storage.kind, layer.seam, layer.scored) == (kind, seam, scored)
    shape = layer.geometry
    assert (shape.hidden, shape.experts, shape.top_k) == (HIDDEN, EXPERTS, 1 if family == "zaya" else TOP_K)
    assert shape.width in (WIDTH, 40)
    assert shape.transposed == transposed
    assert shape.weighs_inputs == (family == "llama4_text")
    assert (layer.router is not None) == (family in CONTRACT)
    assert layer.passed == ((BIASED[family],) if family in BIASED else ())


def _stirred(model: PreTrainedModel) -> PreTrainedModel:
    """Selection biases large enough to decide."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(tuple(BIASED.values())):
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)))
    return model


@pytest.mark.parametrize("family", sorted(BIASED))
def test_the_gate_of_a_router_that_its_block_gives_a_bias(family: str) -> None:
    layer = find_moe_layers(_stirred(build(family)))[0]
    spec = identify_gate(layer)
    assert spec.scoring == "sigmoid"
    assert spec.bias == BIASED[family]
    hidden_TH = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(1))
    logits_TE, weights_TK, index_TK = layer.ask(hidden_TH)
    ours_TK, chosen_TK = Gate(spec, layer.gate_home)(logits_TE)
    assert torch.equal(chosen_TK, index_TK)
    assert torch.equal(ours_TK, weights_TK)


@pytest.mark.parametrize("family", sorted(BIASED))
def test_a_bias_of_the_block_is_permuted_with_its_experts(family: str) -> None:
    model = _stirred(build(family))
    stock = logits(model)
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    before = {layer.index: getattr(layer.block, BIASED[family]).clone() for layer in find_moe_layers(model)}
    permute_experts(model, {layer.index: order for layer in find_moe_layers(model)})
    torch.testing.assert_close(logits(model), stock, rtol=1e-4, atol=1e-5)
    for layer in find_moe_layers(model):
        assert torch.equal(getattr(layer.block, BIASED[family]), before[layer.index][order])


def test_an_order_of_experts_that_are_no_stacks_is_refused() -> None:
    model = build("dbrx")
    with pytest.raises(UnsupportedModel, match="router"):
        permute_experts(model, {0: [*range(1, EXPERTS), 0]})


def _by_hand(family: str, experts: Any, expert: int, x: Tensor) -> Tensor:
    """One expert's output, written down from the family's own code."""
    silu = nn.functional.silu
    if family == "dbrx":
        w1, v1, w2 = (getattr(experts.mlp, n).view(EXPERTS, -1, HIDDEN)[expert] for n in ("w1", "v1", "w2"))
        made: Tensor = (silu(x @ w1.T) * (x @ v1.T)) @ w2
    elif family == "jetmoe":
        gate, up = (x @ experts.input_linear.weight[expert].T).chunk(2, dim=-1)
        made = (experts.activation(gate) * up) @ experts.output_linear.weight[expert].T
    else:
        gate, up = (x @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        made = (up * silu(gate)) @ experts.down_proj[expert]
    return made


@pytest.mark.parametrize("family", ["dbrx", "jetmoe", "llama4_text"])
def test_one_expert_by_the_plain_formula(family: str) -> None:
    layer = find_moe_layers(build(family))[0]
    rows_TH = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(4))
    for expert in range(EXPERTS):
        inner_TI, output_TH = expert_of(layer.experts, layer.storage, expert)(rows_TH)
        assert inner_TI.shape == (6, WIDTH)
        torch.testing.assert_close(output_TH, _by_hand(family, layer.experts, expert, rows_TH), rtol=1e-5, atol=1e-6)


class _Dense(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.wi, self.act, self.wo = nn.Linear(16, 10, bias), nn.ReLU(), nn.Linear(10, 16, bias)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.wo(self.act(self.wi(x)))
        return made


class _Listed(nn.ModuleDict):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.num_experts = 3
        for expert in range(3):
            self[f"expert_{expert}"] = _Dense(bias)


@pytest.mark.parametrize("bias", [False, True])
def test_a_module_for_every_expert(bias: bool) -> None:
    torch.manual_seed(0)
    experts = _Listed(bias)
    storage = find_storage(experts)
    assert storage is not None
    assert (storage.kind, storage.experts, storage.width, storage.has_bias) == ("listed", 3, 10, bias)
    rows_TH = torch.randn(5, 16)
    for expert in range(3):
        made = expert_of(experts, storage, expert)(rows_TH)[1]
        torch.testing.assert_close(made, experts[f"expert_{expert}"](rows_TH))


def _dense_router(module: nn.Module) -> None:
    module.num_experts = 4


@pytest.mark.parametrize("change", [None, _dense_router])
def test_what_is_no_moe_for_us_is_told_truthfully(change: Callable[[nn.Module], None] | None) -> None:
    if change is None:
        model: nn.Module = build("doge")
    else:
        model = nn.Sequential(nn.Linear(4, 4))
        change(model[0])
    with pytest.raises(UnsupportedModel, match="is a Mixture of Experts, but") as told:
        find_moe_layers(model)
    assert "convert" not in str(told.value)
    assert "check" in str(told.value)
