"""Running out of memory ends in one typed error, before anything is allocated where that can be known."""

from __future__ import annotations

import pytest
import torch

from moekit import _memory
from moekit._memory import is_out_of_memory, machine_bytes, naming_memory, require_memory
from moekit.conversion.methods.copy import CopyUpcycling
from moekit.errors import OutOfBudget


def test_what_torch_itself_raises_is_named() -> None:
    expected = r"a huge tensor does not fit in memory: .*allocate"
    with pytest.raises(OutOfBudget, match=expected) as caught, naming_memory("a huge tensor", "take less"):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert caught.value.exit_code == 4
    assert is_out_of_memory(caught.value.__cause__)  # type: ignore[arg-type]


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), naming_memory("x", "y"):
        raise RuntimeError("shapes differ")
    assert not is_out_of_memory(ValueError("not enough memory of the past"))


def test_more_than_the_machine_has_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    has = machine_bytes()
    assert has is not None
    assert has > 1 << 28
    require_memory(has, "this", "less")
    with pytest.raises(OutOfBudget, match=f"this needs {has + 1:,} bytes of memory; this machine has {has:,}"):
        require_memory(has + 1, "this", "less")
    monkeypatch.setattr(_memory, "machine_bytes", lambda: None)
    require_memory(1 << 80, "what no system tells", "pass")


def test_a_hundred_million_experts_are_refused_before_they_are_made() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
    with pytest.raises(OutOfBudget, match="100,000,000 experts in each of 2 layers needs") as caught:
        CopyUpcycling(experts=100_000_000).convert(dense)
    # Two layers of 10^8 experts of three matrices 32 x 40 in fp32, and a router row each.
    assert f"{2 * 10**8 * (3 * 32 * 40 + 32) * 4:,} bytes" in str(caught.value)
