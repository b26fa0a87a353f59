"""Conversions that promise it compute the dense model's function, in memory and after a stock reload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit.conversion import ActivationSplit, Conversion, CopyUpcycling, RandomSplit, Residual, WeightSplit

EXACT: dict[str, Conversion] = {
    "copy top-1": CopyUpcycling(experts=4, top_k=1),
    "copy top-3": CopyUpcycling(experts=4, top_k=3),
    "copy mixtral": CopyUpcycling(experts=4, top_k=2, target="mixtral"),
    "copy shared": CopyUpcycling(experts=3, top_k=2, shared=True),
    "random": RandomSplit(experts=4, top_k=4, router="zero"),
    "random shared": RandomSplit(experts=3, top_k=3, shared=24, router="zero"),
    "random normalised": RandomSplit(experts=4, top_k=4, router="zero", normalised=True),
    "random mixtral": RandomSplit(experts=4, top_k=4, router="zero", target="mixtral"),
    "weights": WeightSplit(experts=6, top_k=6, router="zero"),
    "weights shared mixed layers": WeightSplit(experts=4, top_k=4, shared=32, router="zero", layers=(1,)),
    "activation": ActivationSplit(experts=4, top_k=4, router="zero"),
    "activation shared": ActivationSplit(experts=4, top_k=4, shared=32, router="zero", normalised=True),
    "residual": Residual(experts=8, top_k=2),
    "residual random": Residual(experts=8, top_k=1, router="random"),
    "residual some layers": Residual(experts=32, top_k=4, width=16, layers=(0, 2)),
}


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", EXACT)
def test_logits_equal_the_dense_models(name: str, llama: PreTrainedModel, ids: torch.Tensor, tmp_path: Path) -> None:
    moe = EXACT[name].convert(llama, calibration=ids, seed=5)
    want, got = logits(llama, ids), logits(moe, ids)
    assert want.abs().max() > 1, "the comparison would mean little"
    assert (got - want).abs().max() <= (0 if name.startswith("residual") else 1e-4)
    moe.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == type(moe).__name__
    assert torch.equal(logits(again, ids), got)


def test_a_head_of_its_own_stays_though_the_config_says_tied(
    build: Callable[..., PreTrainedModel], ids: torch.Tensor, tmp_path: Path
) -> None:
    """Stock transformers loads such a folder with the stored head, and keeps the config as it is."""
    dense = build("llama", tie_word_embeddings=True)
    dense.lm_head.weight = torch.nn.Parameter(dense.model.embed_tokens.weight.detach().flip(0).clone())
    moe = CopyUpcycling(experts=4, top_k=1).convert(dense, calibration=ids, seed=5)
    assert (logits(moe, ids) - logits(dense, ids)).abs().max() <= 1e-4
    moe.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(moe, ids))


@pytest.mark.parametrize(
    ("family", "fields", "target"),
    [
        ("mistral", {"sliding_window": 8}, "qwen2_moe"),
        ("mistral", {"sliding_window": 8}, "mixtral"),
        ("mistral", {"sliding_window": None}, "mixtral"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "qwen2_moe"),
        ("qwen2", {"tie_word_embeddings": True}, "qwen2_moe"),
        ("llama", {"head_dim": 10, "attention_bias": False}, "qwen2_moe"),
        ("llama", {"head_dim": 10}, "mixtral"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10_000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            "qwen2_moe",
        ),
    ],
)
def test_every_trap_of_the_configs(
    build: Callable[..., PreTrainedModel],
    ids: torch.Tensor,
    tmp_path: Path,
    family: str,
    fields: dict[str, object],
    target: str,
) -> None:
    dense = build(family, **fields)
    moe = CopyUpcycling(experts=2, top_k=1, target=target).convert(dense)  # type: ignore[arg-type]
    assert (logits(moe, ids) - logits(dense, ids)).abs().max() <= 1e-4
    moe.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(moe, ids))


def test_without_renormalisation_copies_would_be_wrong(llama: PreTrainedModel, ids: torch.Tensor) -> None:
    moe = CopyUpcycling(experts=4, top_k=2).convert(llama)
    for layer in moe.model.layers:
        layer.mlp.gate.norm_topk_prob = False
    assert (logits(moe, ids) - logits(llama, ids)).abs().max() > 0.1


def test_redrawn_neurons_end_exactness(llama: PreTrainedModel, ids: torch.Tensor) -> None:
    moe = CopyUpcycling(experts=4, top_k=2, redraw=0.5).convert(llama)
    gate_EJH = moe.model.layers[0].mlp.experts.gate_up_proj
    original_FH = llama.model.layers[0].mlp.gate_proj.weight
    kept = [(gate_EJH[e, :96] == original_FH).all(1) for e in range(4)]
    assert [int(k.sum()) for k in kept] == [48] * 4
    assert not torch.equal(kept[0], kept[1])
    up_kept = (gate_EJH[0, 96:] == llama.model.layers[0].mlp.up_proj.weight).all(1)
    assert torch.equal(up_kept, kept[0]), "one set of neurons for all three matrices"


def test_the_dense_model_is_left_alone(llama: PreTrainedModel, ids: torch.Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    moe = Residual(experts=8, top_k=2).convert(llama, calibration=ids)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert not llama.training
    assert all(not m._forward_pre_hooks for m in llama.modules())


def test_padding_of_calibration_text_counts_nothing(llama: PreTrainedModel, ids: torch.Tensor) -> None:
    padded = torch.full((6, 40), -1)
    padded[:4, :32] = ids
    one, other = (Residual(experts=8, top_k=2).convert(llama, calibration=c) for c in (ids, padded))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_everything_can_be_trained(llama: PreTrainedModel, ids: torch.Tensor) -> None:
    moe = Residual(experts=8, top_k=2).convert(llama, calibration=ids).train()
    moe(ids, labels=ids).loss.backward()
    experts = moe.model.layers[1].mlp.experts
    assert experts.down_proj.grad.abs().sum() > 0
    assert moe.lm_head.weight is moe.model.embed_tokens.weight
    assert all(p.requires_grad for p in moe.parameters())


def test_bfloat16_stays_bfloat16(llama: PreTrainedModel, ids: torch.Tensor, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    moe = Residual(experts=8, top_k=2).convert(dense, calibration=ids)
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(moe, ids), logits(dense, ids)), "doubling and halving are exact in any precision"
    moe.save_pretrained(tmp_path / "moe")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").dtype == torch.bfloat16


def test_generation_goes_the_same_way(llama: PreTrainedModel, ids: torch.Tensor) -> None:
    moe = Residual(experts=8, top_k=2).convert(llama, calibration=ids)
    want, got = (m.generate(ids[:2, :6], max_new_tokens=8, do_sample=False) for m in (llama, moe))
    assert torch.equal(want, got)
    assert moe.generation_config.eos_token_id == llama.generation_config.eos_token_id
