"""Reordering experts is invisible in the logits, in memory and on disk."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moekit.anatomy import find_expert_tensors, find_moe_layers, permute_checkpoint, permute_experts
from moekit.anatomy.permute import expert_counts, inverse
from moekit.errors import BadCheckpoint, BadConfig, UnsupportedModel
from tests.families import FAMILIES, build

GROUPS = {"deepseek_v2": 4, "deepseek_v3": 4, "glm4_moe": 2}
TOKENS = torch.arange(3, 19).reshape(2, 8)


def an_order(family: str, experts: int = 8, seed: int = 0) -> list[int]:
    """A permutation that moves every group as a whole and shuffles inside groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = GROUPS.get(family, 1)
    size = experts // groups
    order: list[int] = []
    for group in torch.randperm(groups, generator=generator).tolist():
        order += [group * size + e for e in torch.randperm(size, generator=generator).tolist()]
    return order


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_do_not_change(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        before = model(TOKENS).logits
        orders = {layer.index: an_order(family, seed=layer.index) for layer in find_moe_layers(model)}
        weights = {layer.index: layer.experts.down_proj.clone() for layer in find_moe_layers(model)}
        permute_experts(model, orders)
        after = model(TOKENS).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    for layer in find_moe_layers(model):
        assert torch.equal(layer.experts.down_proj[0], weights[layer.index][orders[layer.index][0]])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_streamed_checkpoint_loads_in_stock_transformers(family: str, tmp_path) -> None:
    model = build(family)
    with torch.no_grad():
        before = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    counts = expert_counts(shapes, find_expert_tensors(shapes))
    assert set(counts.values()) == {8}
    orders = {layer: an_order(family, seed=layer) for layer in counts}
    moved = dict(permute_checkpoint(tensors.items(), find_expert_tensors(shapes), counts, orders))
    assert {name: tuple(t.shape) for name, t in moved.items()} == shapes
    assert any(not torch.equal(moved[name], tensors[name]) for name in moved)
    save_file({name: t.contiguous() for name, t in moved.items()}, file, metadata={"format": "pt"})
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(TOKENS).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_tearing_groups_apart_is_refused_and_undone() -> None:
    model = build("deepseek_v3")
    with torch.no_grad():
        before = model(TOKENS).logits
        with pytest.raises(UnsupportedModel, match="router chooses") as caught:
            permute_experts(model, {1: [0, 2, 1, 3, 4, 6, 5, 7]})
        assert caught.value.layer == 1
        assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("order", [[0, 1, 2], [0] * 8, list(range(1, 9))])
def test_no_permutation(order: list[int]) -> None:
    with pytest.raises(BadConfig, match="no permutation"):
        permute_experts(build("mixtral"), {0: order})


def test_inverse() -> None:
    assert inverse([2, 0, 1]) == [1, 2, 0]


def test_mixed_layouts_are_refused() -> None:
    with pytest.raises(BadCheckpoint, match="both split and stacked"):
        find_expert_tensors(["model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.mlp.experts.down_proj"])
