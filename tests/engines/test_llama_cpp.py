"""What was pruned opens in another engine: llama.cpp computes and generates what transformers does.

Needs `pip install llama-cpp-python`, which compiles llama.cpp for some ten minutes; left out where it is not there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

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
from tests.families import tokens

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

KEPT, NEW = 5, 12


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
    engine = llama_cpp.Llama(
        str(tmp_path / "gguf" / "model.gguf"),
        n_ctx=64,
        logits_all=True,
        verbose=False,
        type_k=0,
        type_v=0,
        flash_attn=False,
    )
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
