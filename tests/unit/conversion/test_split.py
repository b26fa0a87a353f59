"""Splits: hand-worked numbers, each neuron in one place, and equality with a masked dense network."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from moekit.anatomy.permute import permute_experts
from moekit.conversion import ActivationSplit, DenseFFN, RandomSplit, SplitConversion, WeightSplit
from moekit.conversion.maths import (
    expert_energies,
    ffn_forward,
    gather_experts,
    neuron_outputs,
    neuron_strengths,
)
from moekit.conversion.methods.activation import strongest_markers

# The worked example: H = 3, F = 4.
FFN = DenseFFN(
    torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.float64),
    torch.tensor([[1.0, 1, 0], [0, 1, 1], [1, 0, 1], [0.5, 0, 0]], dtype=torch.float64),
    torch.tensor([[1.0, 2, 0, 1], [0, 1, 1, 1], [1, 0, 2, 0]], dtype=torch.float64),
)
X = torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64)


def close(got: torch.Tensor, want: list[float]) -> bool:
    return torch.allclose(got, torch.tensor([want], dtype=torch.float64), atol=5e-5)


def test_the_worked_example() -> None:
    assert close(neuron_outputs(FFN, X), [0, -0.2689, 5.2848, 0.8808])
    assert close(ffn_forward(FFN, X), [0.3429, 5.8966, 10.5696])
    assert close(ffn_forward(FFN.take(torch.tensor([0, 3])), X), [0.8808, 0.8808, 0])
    assert close(ffn_forward(FFN.take(torch.tensor([1, 2])), X), [-0.5379, 5.0158, 10.5696])
    energies = expert_energies(FFN, X, torch.tensor([[0, 3], [1, 2]]))
    want = torch.tensor([[2 * 0.8808**2, 0.5379**2 + 5.0158**2 + 10.5696**2]], dtype=torch.float64)
    assert torch.allclose(energies, want, rtol=1e-4)
    # |h_j| ||down_j||: norms of the columns are sqrt 2, sqrt 5, sqrt 5, sqrt 2
    assert close(neuron_strengths(FFN, X) / 5**0.5, [0, 0.2689, 5.2848, 0.8808 * 0.4**0.5])


def test_fused_weights_hold_gate_rows_before_up_rows() -> None:
    neurons = torch.tensor([[0, 3], [1, 2]])
    gate_up, down = gather_experts(FFN, neurons, scale=3.0)
    assert gate_up.shape == (2, 4, 3)
    assert torch.equal(gate_up[1, :2], FFN.gate_FH[[1, 2]])
    assert torch.equal(gate_up[1, 2:], FFN.up_FH[[1, 2]])
    assert torch.equal(down[0], 3.0 * FFN.down_HF[:, [0, 3]])


def test_markers_by_hand() -> None:
    strength = torch.tensor([[0.1, 0.9, 0.5, 0.2], [3.0, 1.0, 2.0, 0.0]])
    assert strongest_markers(strength, 0.5).tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]
    assert strongest_markers(strength, 0.01).sum(1).tolist() == [1, 1]


SPLITS = [RandomSplit, WeightSplit, ActivationSplit]


@pytest.mark.parametrize("cls", SPLITS)
@pytest.mark.parametrize(("experts", "shared"), [(4, 0), (8, 16), (2, 46)])
def test_each_neuron_goes_to_exactly_one_place(cls: type[SplitConversion], experts: int, shared: int) -> None:
    generator = torch.Generator().manual_seed(0)
    width, hidden = 48, 16
    ffn = DenseFFN(*(torch.randn(*s, generator=generator) for s in ((width, hidden), (width, hidden), (hidden, width))))
    inputs = torch.randn(200, hidden, generator=generator)
    shared_S, neurons_EI = cls(experts=experts, shared=shared).choose_neurons(ffn, inputs, generator)
    assert (len(shared_S), neurons_EI.shape) == (shared, (experts, (width - shared) // experts))
    assert sorted([*shared_S.tolist(), *neurons_EI.flatten().tolist()]) == list(range(width))
    # in double precision the parts sum to the whole
    ffn64, x64 = DenseFFN(*(w.double() for w in ffn)), inputs.double()
    total = ffn_forward(ffn64.take(shared_S), x64) + sum(ffn_forward(ffn64.take(n), x64) for n in neurons_EI)
    assert (total - ffn_forward(ffn64, x64)).abs().max() <= 1e-12 * 1e3


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_any_k_equals_masking_the_dense_network(llama: PreTrainedModel, ids: torch.Tensor, k: int) -> None:
    """One export, stored for k = 4; its router then decides which neurons of the dense network count."""
    moe = WeightSplit(experts=4, top_k=4, shared=32, router="random", router_scale=1e-4).convert(llama, seed=2)
    hidden = torch.randn(11, 24, generator=torch.Generator().manual_seed(k))
    for dense_layer, moe_layer in zip(llama.model.layers, moe.model.layers, strict=True):
        gate = moe_layer.mlp.gate
        gate.top_k = k
        _, weights, chosen = gate(hidden)
        assert torch.allclose(weights, torch.full_like(weights, 0.25), atol=1e-4)
        mlp = dense_layer.mlp
        h = torch.nn.functional.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        owner = _owners(mlp.gate_proj.weight, moe_layer.mlp)
        keep = (owner[None, :, None] == chosen[:, None, :]).any(-1) | (owner == -1)
        want = mlp.down_proj(h * keep)
        got = moe_layer.mlp(hidden[None])[0]
        assert (got - want).abs().max() <= 2e-3 * want.abs().max()


def _owners(gate_FH: torch.Tensor, block: torch.nn.Module) -> torch.Tensor:
    """Expert of each dense neuron, found by its gate row; -1 for the shared expert."""
    width = block.experts.down_proj.shape[2]
    rows = {tuple(row.tolist()): e for e in range(4) for row in block.experts.gate_up_proj[e, :width]}
    return torch.tensor([rows.get(tuple(row.tolist()), -1) for row in gate_FH])


def test_permuting_experts_is_invisible(llama: PreTrainedModel, ids: torch.Tensor) -> None:
    moe = ActivationSplit(experts=6, top_k=3, router_scale=1.0).convert(llama, calibration=ids)
    with torch.no_grad():
        before = moe(ids).logits
        permute_experts(moe, {0: [3, 1, 5, 0, 2, 4], 2: [5, 4, 3, 2, 1, 0]})
        assert (moe(ids).logits - before).abs().max() <= 1e-4


def test_seeds_repeat_and_layers_differ(llama: PreTrainedModel) -> None:
    first, again, other = (RandomSplit(experts=4, router="zero", top_k=2).convert(llama, seed=s) for s in (1, 1, 2))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if "gate_up_proj" in name:
            assert not torch.equal(a, c)


def test_the_shared_expert_takes_what_fires_most() -> None:
    hidden, width = 8, 16
    generator = torch.Generator().manual_seed(3)
    ffn = DenseFFN(*(torch.randn(*s, generator=generator) for s in ((width, hidden), (width, hidden), (hidden, width))))
    ffn.down_HF[:, [2, 11, 13, 7]] *= 50
    inputs = torch.randn(300, hidden, generator=generator)
    shared_S, _ = ActivationSplit(experts=4, shared=4, marked=0.25).choose_neurons(ffn, inputs, generator)
    assert shared_S.tolist() == [2, 7, 11, 13]
    shared_S, _ = WeightSplit(experts=4, shared=4).choose_neurons(ffn, None, generator)
    assert shared_S.tolist() == [2, 7, 11, 13]
