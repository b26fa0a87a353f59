"""What was pruned or packed opens in another engine: llama.cpp computes and generates what transformers does.

Needs `pip install llama-cpp-python`, which compiles llama.cpp for some ten minutes; left out where it is not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import moekit
from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.apply import apply
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import PlanRequest
from moekit.compress.prune.reap import REAP
from moekit.trace.streamed import record_streamed
from tests.checkpoints import plain
from tests.exporting import rounded
from tests.families import EXPERTS, tokens

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

KEPT, NEW = 5, 12
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256}  # k-quants are blocks of 256
PARTS = ("gate", "up", "down")


def engine_of(folder: Path) -> Any:
    return llama_cpp.Llama(
        str(folder / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False
    )


def engine_logits(folder: Path, prompt: torch.Tensor) -> np.ndarray[Any, Any]:
    engine = engine_of(folder)
    engine.eval(prompt[0].tolist())
    return np.array(engine.scores[: prompt.shape[1]])


def experts_of(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Name -> type and numbers of the experts in a file."""
    gguf = pytest.importorskip("gguf")
    return {
        t.name: (
            t.tensor_type.name,
            torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)).reshape([int(n) for n in t.shape[::-1]]),
        )
        for t in gguf.GGUFReader(folder / "model.gguf").tensors
        if "_exps." in t.name
    }


def stock_experts(folder: Path, layer: int, part: str) -> torch.Tensor:
    """All experts of a layer and projection of a Qwen3-MoE folder [E, R, C]."""
    tensors = {n: t for file in folder.glob("model*.safetensors") for n, t in load_file(file).items()}
    return torch.stack([tensors[f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"] for e in range(EXPERTS)])


def step(bits: int) -> float:
    """Error of numbers on even grids over the spread of 32 normal ones (4.1 sigma), in units of their size."""
    return float(4.1 / (2**bits - 1) / 12**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_pruned_folder_opens_in_llama_cpp(family: str, tmp_path: Path) -> None:
    checkpoint, method = Checkpoint.open(plain(tmp_path / "whole", family)), REAP()
    trace = record_streamed(checkpoint, [tokens(4, 24, seed=21)], statistics=("load", *method.required))
    plan = plan_weights(checkpoint, trace, PlanRequest(method, Budget(keep=KEPT)))
    apply(checkpoint, plan.outcomes, tmp_path / "out", record=Record(command="a test"))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert find_moe_layers(model)[0].geometry.experts == KEPT
    moekit.export(tmp_path / "out", to="gguf", out=tmp_path / "gguf")
    engine = engine_of(tmp_path / "gguf")
    prompt = tokens(1, 16, seed=5)
    with torch.no_grad():
        expected = model(prompt).logits[0].numpy()
    engine.eval(prompt[0].tolist())
    np.testing.assert_allclose(engine.scores[: prompt.shape[1]], expected, rtol=1e-4, atol=1e-5)

    stock = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = prompt[0].tolist()
    engine.reset()
    engine.eval(ids)
    for _ in range(NEW):
        ids.append(int(np.argmax(engine.scores[engine.n_tokens - 1])))
        engine.eval(ids[-1:])
    assert ids == stock[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits"), [("q2_k", 2), ("q3_k_s", 3), ("q4_k_s", 4), ("q5_k_m", 5), ("q6_k", 6)])
def test_k_quants_are_as_near_as_their_bits_say(kind: str, bits: int, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen3_moe", **WIDE)
    made = moekit.export(source, to="gguf", tensor_type=kind, out=tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.gguf"], "no file of floats is left"
    found = experts_of(tmp_path / "out")
    assert len(found) == 6
    assert sum(made.matrices.values()) == 6
    assert not {name for name, _ in found.values()} & {"F32", "F16", "BF16"}
    for layer in (0, 1):
        for part in PARTS:
            held, values = found[f"blk.{layer}.ffn_{part}_exps.weight"]
            before = stock_experts(source, layer, part)
            error = float((values - before).norm() / before.norm())
            # llama.cpp gives some tensors a bit or two more than the name says, never fewer.
            assert step(bits + 3) < error < 1.3 * step(bits), (held, error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q2_k", "q4_k_m"])
def test_llama_cpp_computes_from_k_quants_what_transformers_does_from_their_weights(kind: str, tmp_path: Path) -> None:
    source, prompt = plain(tmp_path / "source", "qwen3_moe", **WIDE), tokens(1, 16, seed=5)
    moekit.export(source, to="gguf", tensor_type=kind, out=tmp_path / "out")
    config = AutoConfig.from_pretrained(source)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", config=config, dtype=torch.float32
    )
    with torch.no_grad():
        expected = stock.eval()(prompt).logits[0].numpy()
    made = engine_logits(tmp_path / "out", prompt)
    # The engine rounds what it multiplies with to eight bits in blocks, in every product: per cents in the end. The
    # weights as they were before are further away than that.
    unrounded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        before = unrounded(prompt).logits[0].numpy()
    assert np.median(off(made, expected)) < 0.04
    assert np.median(off(before, expected)) > 3 * np.median(off(made, expected))


def off(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each token; one that chooses another expert for a hair is far off, whatever the weights."""
    far: np.ndarray[Any, Any] = np.linalg.norm(one - other, axis=-1) / np.linalg.norm(other, axis=-1)
    return far


@pytest.mark.slow
def test_experts_that_a_plan_rounded_keep_their_numbers_or_take_their_bits(tmp_path: Path) -> None:
    source = rounded(tmp_path / "rounded", "qwen3_moe", lambda layer, part, expert: (2, 4)[layer], group=32, **WIDE)
    made = moekit.export(source, to="gguf", tensor_type="q4_k_m", out=tmp_path / "exact")
    assert made.matrices == {"Q4_0": 6}
    for name, (_, values) in experts_of(tmp_path / "exact").items():
        layer, part = int(name.split(".")[1]), name.split("_")[1]
        assert torch.equal(values, stock_experts(source, layer, part)), name
    again = moekit.export(source, to="gguf", tensor_type="q4_k_m", round_again=True, out=tmp_path / "again")
    assert again.matrices == {"Q2_K": 3, "Q4_K": 3}
    assert {name: kind for name, (kind, _) in experts_of(tmp_path / "again").items() if ".0." in name} == {
        f"blk.0.ffn_{part}_exps.weight": "Q2_K" for part in PARTS
    }
    assert again.bytes["experts"] < made.bytes["experts"]


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
        ("deepseek_v3", {"rope_parameters": YARN}),
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v2", {"topk_method": "greedy", "rope_parameters": YARN}),
        ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None, "num_hidden_layers": 26}),
        ("glm4_moe", {"n_group": 1}),
        ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
        ("ernie4_5_moe", {}),
        ("olmoe", {"num_key_value_heads": 4}),
        ("qwen2_moe", {}),
    ],
)
def test_families_compute_in_llama_cpp_what_they_do_in_transformers(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source, prompt = plain(tmp_path / "source", family, **changes), tokens(1, 48, seed=5)
    moekit.export(source, to="gguf", out=tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(prompt).logits[0].numpy()
    np.testing.assert_allclose(engine_logits(tmp_path / "out", prompt), expected, rtol=1e-3, atol=1e-4)
