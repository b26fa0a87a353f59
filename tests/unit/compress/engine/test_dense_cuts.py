"""Groups of attention heads and neurons of shared experts that go: the written folder is the masked model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.dense_cuts import InputCut, cuttables, masked
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.part_scores import part_scores, strongest
from moekit.data import TokenizedDocument
from moekit.errors import BadConfig, UnsupportedModel
from moekit.evaluation.changes import Variant
from moekit.evaluation.variants import compare_variants
from tests.checkpoints import plain
from tests.families import EXPERTS, HIDDEN, VOCAB, WIDTH, build, logits, tokens

HEADS, PAIRS, HEAD_DIM = 4, 2, 8


def same(family: str) -> dict[int, LayerOutcome]:
    return {layer.index: LayerOutcome(keep=tuple(range(EXPERTS))) for layer in find_moe_layers(build(family))}


def written(folder: Path, family: str, kind: str, keep: int) -> tuple[Checkpoint, dict[str, InputCut]]:
    source = Checkpoint.open(plain(folder / "moe", family))
    known = cuttables(source, [kind])  # type: ignore[list-item]
    # Each layer keeps other parts.
    cuts = {name: each.cut((each.layer + n) % each.parts for n in range(keep)) for name, each in known.items()}
    apply(source, same(family), folder / "out", record=Record(command="a test"), cuts=cuts)
    return source, cuts


@pytest.mark.parametrize(
    ("family", "kind", "keep"),
    [
        ("qwen3_moe", "groups", 1),  # norms of queries and keys, a head each
        ("mixtral", "groups", 1),  # no width of a head in the config
        ("qwen2_moe", "groups", 1),  # biases
        ("gpt_oss", "groups", 1),  # biases and a sink for each head
        ("glm4_moe", "groups", 1),  # a layer without experts
        ("qwen2_moe", "shared", 8),
    ],
)
def test_a_stock_folder_is_the_masked_model(family: str, kind: str, keep: int, tmp_path: Path) -> None:
    _, cuts = written(tmp_path, family, kind, keep)
    model, opened = build(family), AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(opened) is type(model)
    with masked(model, cuts):
        hidden = logits(model)
    torch.testing.assert_close(logits(opened), hidden, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(hidden, logits(model), atol=1e-6), "the mask is gone again, and changed something"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if kind == "groups":
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS // PAIRS, 1)
        assert config["head_dim"] == HEAD_DIM
    else:
        assert config["shared_expert_intermediate_size"] == keep


def test_the_proof_measures_what_is_written(tmp_path: Path) -> None:
    text = [TokenizedDocument(tokens(1, 30, seed=n)[0].tolist(), "all", n) for n in range(3)]
    for number, (family, kind, keep) in enumerate((("glm4_moe", "groups", 1), ("qwen2_moe", "shared", 8))):
        source, cuts = written(tmp_path / str(number), family, kind, keep)
        before, (proved,) = compare_variants(source, text, [Variant("cut", same(family), cuts=cuts)])
        after, _ = compare_variants(Checkpoint.open(tmp_path / str(number) / "out"), text, [])
        assert proved.perplexity.nll == pytest.approx(after.nll, rel=1e-5)
        assert before.nll != pytest.approx(after.nll, rel=1e-3)
        if kind == "shared":
            assert min(proved.reconstruction.values()) > 0.01


def test_the_number_of_weights_is_that_of_the_formula(tmp_path: Path) -> None:
    written(tmp_path, "mixtral", "groups", 1)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers, heads, pairs = 2, HEADS // PAIRS, 1
    attention = 2 * HIDDEN * heads * HEAD_DIM + 2 * HIDDEN * pairs * HEAD_DIM
    norms = layers * 2 * HIDDEN + HIDDEN
    wanted = layers * (attention + EXPERTS * 3 * HIDDEN * WIDTH + EXPERTS * HIDDEN) + 2 * VOCAB * HIDDEN + norms
    assert sum(parameter.numel() for parameter in opened.parameters()) == wanted


@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [
        ("deepseek_v3", "groups", "latent"),
        ("olmoe", "groups", "over all heads"),
        ("qwen3_moe", "shared", "0 shared experts"),
    ],
)
def test_what_does_not_stand_alone_is_refused(family: str, kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        cuttables(Checkpoint.open(plain(tmp_path / "moe", family)), [kind])  # type: ignore[list-item]


def test_layers_keep_equally_many(tmp_path: Path) -> None:
    source = Checkpoint.open(plain(tmp_path / "moe", "qwen2_moe"))
    cuts = {name: each.cut(range(4 + each.layer)) for name, each in cuttables(source, ["shared"]).items()}
    with pytest.raises(BadConfig, match="different numbers"):
        apply(source, same("qwen2_moe"), tmp_path / "out", record=Record(command="a test"), cuts=cuts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "kind"), [("qwen3_moe", "groups"), ("qwen2_moe", "shared")])
def test_scores_are_what_autograd_says_of_a_factor_on_each_part(family: str, kind: str, tmp_path: Path) -> None:
    """The score of a part is the sum of |dL / d(its factor)| over all positions."""
    model = copy.deepcopy(build(family))
    source = Checkpoint.open(plain(tmp_path / "moe", family))
    known = cuttables(source, [kind])  # type: ignore[list-item]
    batches = [tokens(2, 5, seed=4), tokens(1, 7, seed=5)]
    found = part_scores(model, batches, known)
    name, each = next(iter(known.items()))
    wanted = torch.zeros(each.parts).double()
    for ids in batches:
        size = model.get_submodule(name).weight.shape[1] // each.parts
        factor = torch.ones(*ids.shape, each.parts).requires_grad_()

        def scale(module: object, args: tuple[Tensor, ...], factor: Tensor = factor, size: int = size) -> Tensor:
            return args[0] * factor.reshape(*args[0].shape[:-1], -1).repeat_interleave(size, -1)

        handle = model.get_submodule(name).register_forward_pre_hook(scale)
        said = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(said, ids[:, 1:].flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, factor)
        handle.remove()
        wanted += gradient.abs().flatten(0, -2).sum(0)
    torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-6)
    assert strongest(torch.tensor([1.0, 3.0, 3.0, 0.0]), 2) == (1, 2)
