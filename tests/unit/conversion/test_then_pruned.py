"""A dense model becomes a MoE without shared expert, and then loses experts: what is left is the plain formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu, softmax
from transformers import AutoModelForCausalLM

import moekit
from moekit.checking import check
from tests.tiny import tokenizer, write_text
from tests.unit.conversion.conftest import dense_model

EXPERTS, TOP_K, KEEP = 6, 2, 4


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def plain_block(tensors: dict[str, torch.Tensor], layer: int, kept: list[int], normalised: bool) -> Any:
    """The block of the converted model with these experts alone: no shared expert, one token after the other."""
    stem = f"model.layers.{layer}.mlp"
    rows_MH = tensors[f"{stem}.gate.weight"][kept]

    def block(hidden_BSH: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        made = torch.zeros_like(hidden_BSH)
        for place in range(hidden_BSH[..., 0].numel()):
            x_H = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])[place]
            scores_M = softmax(rows_MH @ x_H, dim=-1)
            best = scores_M.argsort(descending=True)[:TOP_K].tolist()
            total = sum(float(scores_M[e]) for e in best) if normalised else 1.0
            for e in best:
                gate, up, down = (
                    tensors[f"{stem}.experts.{kept[e]}.{part}_proj.weight"] for part in ("gate", "up", "down")
                )
                made.view(-1, x_H.numel())[place] += scores_M[e] / total * (down @ (silu(gate @ x_H) * (up @ x_H)))
        return made

    return block


@pytest.mark.parametrize("stacked", [False, True], ids=["split", "stacked"])
def test_a_converted_model_can_be_pruned(stacked: bool, tmp_path: Path) -> None:
    dense_model("llama", num_hidden_layers=2, vocab_size=128, max_position_embeddings=128).save_pretrained(
        tmp_path / "dense"
    )
    tokenizer().save_pretrained(tmp_path / "dense")
    text = write_text(tmp_path / "text", documents=10)
    settings = {"experts": EXPERTS, "top_k": TOP_K}
    moekit.convert(
        tmp_path / "dense",
        method="activation",
        settings=settings,
        data=text,
        max_tokens=1024,
        seq_len=64,
        out=tmp_path / "moe",
    )
    source = tmp_path / "moe"
    before = tensors_of(source)
    # The layout has no other way to say that there is no shared expert.
    assert before["model.layers.0.mlp.shared_expert.up_proj.weight"].shape == (0, 24)
    if stacked:
        source = tmp_path / "stacked"
        AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(source, save_original_format=False)
        tokenizer().save_pretrained(source)
        assert "model.layers.0.mlp.experts.down_proj" in tensors_of(source)
    pruned = moekit.prune(
        source, method="reap", keep=KEEP, data=text, max_tokens=1024, seq_len=64, proof=False, out=tmp_path / "pruned"
    )
    assert check(tmp_path / "pruned", parent=source).ok
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert model.config.num_experts == KEEP
    ids = torch.randint(4, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = model(input_ids=ids).logits
        for told in pruned.layers:
            assert len(told["kept"]) == KEEP
            block = model.model.layers[told["layer"]].mlp
            block.forward = plain_block(before, told["layer"], told["kept"], model.config.norm_topk_prob)
        wanted = model(input_ids=ids).logits
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, AutoModelForCausalLM.from_pretrained(source)(input_ids=ids).logits, atol=1e-2)
