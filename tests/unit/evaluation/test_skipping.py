"""Skipping experts layer by layer from disk, against stock models whose down projections are zeroed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.data import TokenizedDocument
from moekit.diagnose.super_experts.ablation import Pair
from moekit.diagnose.super_experts.report import SHARED
from moekit.errors import BadConfig
from moekit.evaluation import perplexity_of_documents
from moekit.evaluation.skipping import UNCHANGED, Ablation, compare_without
from tests.families import build, tokens

PAIRS: dict[str, list[Pair]] = {
    "mixtral": [(0, 1), (0, 5), (1, 2)],
    "gpt_oss": [(0, 1), (0, 5), (1, 2)],
    "qwen2_moe": [(1, SHARED), (0, 3)],
    "deepseek_v3": [(2, 6), (1, SHARED)],
    "phimoe": [(1, 0), (1, 7)],
}


def documents() -> list[TokenizedDocument]:
    rows = [tokens(1, length, seed=length)[0].tolist() for length in (7, 19, 12)]
    return [TokenizedDocument(ids=ids, domain="ab"[n % 2], index=n) for n, ids in enumerate(rows)]


@torch.no_grad()
def zeroed(folder: Path, pairs: list[Pair]) -> Any:
    """The stock model with zeros where experts come down."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = {layer.index: layer for layer in find_moe_layers(model)}
    for layer, expert in pairs:
        found = layers[layer]
        if expert == SHARED:
            for module in found.shared:
                for name, tensor in module.named_parameters():
                    if "down" in name:
                        tensor.zero_()
            continue
        found.experts.down_proj[expert] = 0  # type: ignore[index, operator]
        if found.geometry.has_bias:
            found.experts.down_proj_bias[expert] = 0  # type: ignore[index, operator]
    return model


@pytest.mark.parametrize("family", sorted(PAIRS))
def test_it_is_what_a_stock_model_with_zeroed_experts_gives(tmp_path: Path, family: str) -> None:
    build(family).save_pretrained(tmp_path)
    pairs, other = PAIRS[family], PAIRS[family][:1]
    ablations = [Ablation("some", tuple(pairs)), Ablation("one", tuple(other))]
    # A window below the longest document: long ones go in pieces.
    found = compare_without(Checkpoint.open(tmp_path), documents(), ablations, window=10, folder=tmp_path)
    assert list(found) == [UNCHANGED, "some", "one"]
    for name, gone in ((UNCHANGED, []), ("some", pairs), ("one", other)):
        model = zeroed(tmp_path, gone)
        largest: dict[int, float] = {}

        def keep(_m: Any, _a: Any, out: Any, *, n: int, largest: dict[int, float] = largest) -> None:
            made = out[0] if isinstance(out, tuple) else out
            largest[n] = max(largest.get(n, 0.0), float(made.abs().max()))

        for n, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda m, a, o, n=n, keep=keep: keep(m, a, o, n=n))
        slow = perplexity_of_documents(model, documents(), window=10, batch_tokens=1)
        assert found[name].perplexity.domains == slow.domains
        assert found[name].perplexity.tokens == slow.tokens
        assert found[name].perplexity.nll == pytest.approx(slow.nll, rel=1e-5)
        assert dict(found[name].largest) == pytest.approx(largest, rel=1e-4)
    assert found["some"].perplexity.nll != pytest.approx(found[UNCHANGED].perplexity.nll, rel=1e-4)


def test_the_weights_on_disk_and_in_memory_are_left_alone(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    both = [Ablation("some", ((0, 1), (1, 2))), Ablation("last", ((1, 3),))]
    first = compare_without(checkpoint, documents(), both)
    again = compare_without(checkpoint, documents(), both[::-1])
    assert {name: told.perplexity.nll for name, told in first.items()} == {
        name: told.perplexity.nll for name, told in again.items()
    }
    # Before the first layer that is touched, all is the same to the bit.
    assert first["last"].largest[0] == first[UNCHANGED].largest[0]
    assert first["last"].perplexity.nll != first[UNCHANGED].perplexity.nll != first["some"].perplexity.nll


def test_what_cannot_be_skipped_is_refused(tmp_path: Path) -> None:
    build("deepseek_v3").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    for pair, words in (((0, 1), "no MoE layer"), ((1, 8), "no such expert")):
        with pytest.raises(BadConfig, match=words):
            compare_without(checkpoint, documents(), [Ablation("a", (pair,))])
    for names in (("a", "a"), (UNCHANGED, "b")):
        with pytest.raises(BadConfig, match="one name"):
            compare_without(checkpoint, documents(), [Ablation(name, ((1, 1),)) for name in names])
