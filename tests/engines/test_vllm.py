"""What moekit writes opens in vLLM: log-probabilities and greedy choices are those of stock transformers.

Needs an environment of vLLM's own, as it pins another transformers: `make test-engines` makes it. Its Python is looked
for where MOEKIT_VLLM says, or in .venv-vllm; without it these tests are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moekit
from moekit.family import texts, tokenizer

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MOEKIT_VLLM", ROOT / ".venv-vllm" / "bin" / "python"))
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
NEW, LENGTH = 12, 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM: {PYTHON} is not there"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE whose heads are as wide as vLLM's kernels ask for, with a text beside it."""
    folder = tmp_path_factory.mktemp("vllm")
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for domain, documents in texts().items():
        (folder / "text" / domain).mkdir(parents=True)
        for number, document in enumerate(documents):
            (folder / "text" / domain / f"{number}.txt").write_text(document, encoding="utf-8")
    return folder


WAYS: dict[str, Callable[..., Any]] = {
    "pruned": lambda model, **rest: moekit.prune(model, method="reap", keep=5, **rest),
    "merged": lambda model, **rest: moekit.merge(model, method="hc-smoe", keep=5, **rest),
    "slimmed": lambda model, **rest: moekit.slim(
        model, method="slimmoe", width="1/2", settings={"multiple": 16}, **rest
    ),
    "rounded": lambda model, **rest: moekit.quantize(model, method="gptq", bits=4, settings={"group": 32}, **rest),
}


def asked(folder: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """What vLLM says."""
    script = Path(__file__).with_name("in_vllm.py")
    run = subprocess.run(
        [str(PYTHON), str(script), str(folder), json.dumps(prompts), str(NEW)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told: list[dict[str, Any]] = json.loads(run.stdout.strip().splitlines()[-1])
    return told


@pytest.mark.parametrize("way", WAYS)
def test_vllm_says_what_transformers_says(way: str, source: Path, tmp_path: Path) -> None:
    WAYS[way](source / "model", data=source / "text", out=tmp_path / "out", device="cpu", proof=False, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids_BS = torch.randint(4, 100, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    told = asked(tmp_path / "out", ids_BS.tolist())
    with torch.no_grad():
        logprobs_BSV = model(ids_BS).logits.float().log_softmax(-1)
        chosen = model.generate(ids_BS, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected_BS = logprobs_BSV[:, :-1].gather(-1, ids_BS[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor([row["logprobs"] for row in told]), expected_BS, rtol=1e-3, atol=1e-3)
    assert [row["chosen"] for row in told] == chosen[:, LENGTH:].tolist()
