"""Variants measured side by side, layer by layer from disk, cost what the same models cost when run whole.

The references are models of fewer experts, whose weights are sliced here by hand, run document by document.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from moekit.evaluation.changes import Variant
from moekit.evaluation.documents import perplexity_of_documents
from moekit.evaluation.likelihood import mean_divergence
from moekit.evaluation.variants import VariantResult, compare_variants
from tests.checkpoints import plain
from tests.families import EXPERTS, build, tokens

# The config's own name for the number of experts, and what else goes with dropping some.
COUNTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("num_local_experts", {}),
    "qwen2_moe": ("num_experts", {}),
    "deepseek_v3": ("n_routed_experts", {"n_group": 1, "topk_group": 1}),
    "gpt_oss": ("num_local_experts", {}),
}
KEEP = {0: (0, 2, 3, 5, 7), 1: (1, 2, 4, 5, 6), 2: (0, 1, 3, 4, 6)}


@dataclass(frozen=True)
class Document:
    ids: list[int]
    domain: str


DOCUMENTS = [
    Document(tokens(1, length, seed=seed)[0].tolist(), domain)
    for seed, (length, domain) in enumerate([(12, "a"), (7, "b"), (1, "b"), (15, "a"), (9, "b")])
]


def blocks(model: nn.Module) -> dict[int, nn.Module]:
    """Decoder layer -> its MoE block."""
    return {
        i: layer.mlp
        for i, layer in enumerate(model.model.layers)  # type: ignore[union-attr, arg-type]
        if hasattr(layer.mlp, "experts")
    }


def sliced(family: str, keep: dict[int, tuple[int, ...]], **overrides: Any) -> Any:
    """A model of fewer experts, each tensor that counts experts cut along its first axis."""
    key, more = COUNTS[family]
    counts = {layer: len(kept) for layer, kept in keep.items()}
    large = build(family)
    small = build(family, **{key: max(counts.values())}, **(more | overrides))
    for layer, count in counts.items():
        if layer in blocks(large) and count < max(counts.values()):
            donor = build(family, **{key: count}, **(more | overrides))
            small.model.layers[layer].mlp = donor.model.layers[layer].mlp
    state = large.state_dict()
    for layer in blocks(large):
        for name, tensor in list(state.items()):
            if name.startswith(f"model.layers.{layer}.mlp.") and tensor.shape[0] == EXPERTS and "shared" not in name:
                state[name] = tensor[list(keep[layer])]
    small.load_state_dict(state)
    return small


@torch.no_grad()
def likelihoods(model: Any) -> list[float]:
    """Summed negative log likelihood of each document, on its own."""
    found = []
    for document in DOCUMENTS:
        ids = torch.tensor([document.ids])
        log_p = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)[0, :-1]
        found.append(-float(log_p.gather(1, ids[0, 1:, None]).sum()))
    return found


@torch.no_grad()
def divergence(large: Any, small: Any) -> float:
    """Mean KL of what the large model predicts to what the small one does, in fp64."""
    total, count = 0.0, 0
    for document in DOCUMENTS:
        if len(document.ids) > 1:
            ids = torch.tensor([document.ids[:-1]])
            p, q = (m(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1) for m in (large, small))
            total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    return total / count


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[2.0, 1, 0, -1]]), torch.tensor([[1.5, 1.2, 0.1, -0.8]])
    assert mean_divergence(p.log_softmax(-1), q) == pytest.approx(0.05532, abs=1e-5)
    assert mean_divergence(p.log_softmax(-1), p + 3) == pytest.approx(0, abs=1e-7)
    never = torch.tensor([[0.0, float("-inf")]])
    assert mean_divergence(never, torch.tensor([[0.0, 0.0]])) == pytest.approx(0.693147, abs=1e-5)


@torch.no_grad()
def seen(model: Any) -> dict[int, tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]]:
    """Decoder layer -> inputs and outputs of the block, and choices, document by document."""
    found: dict[int, tuple[list[torch.Tensor], ...]] = {layer: ([], [], []) for layer in blocks(model)}
    handles = []
    for layer, block in blocks(model).items():

        def outer(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            found[layer][0].append(args[0].flatten(0, 1))
            found[layer][1].append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))

        def inner(module: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
            given = [a for a in (*args, *kwargs.values()) if torch.is_tensor(a) and not a.is_floating_point()]
            found[layer][2].append(given[0])

        handles += [
            block.register_forward_hook(outer),
            block.experts.register_forward_pre_hook(inner, with_kwargs=True),  # type: ignore[union-attr, operator]
        ]
    for document in DOCUMENTS:
        if len(document.ids) > 1:  # what has no next token is not read at all
            model(input_ids=torch.tensor([document.ids[:-1]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found  # type: ignore[return-value]


def outcomes(keep: dict[int, tuple[int, ...]], layers: Any) -> dict[int, LayerOutcome]:
    return {layer: LayerOutcome(keep=keep[layer]) for layer in layers}


def check(result: VariantResult, small: Any, large: Any, keep: dict[int, tuple[int, ...]]) -> None:
    assert result.perplexity.nll == pytest.approx(likelihoods(small), abs=1e-4)
    for layer, (inputs, outputs, choices) in seen(large).items():
        block = blocks(small)[layer]
        with torch.no_grad():
            made = [block(x[None]) for x in inputs]
        changed = torch.cat([(m[0] if isinstance(m, tuple) else m).flatten(0, 1) for m in made]).double()
        whole = torch.cat(outputs).double()
        expected = float((changed - whole).norm() / whole.norm())
        assert result.reconstruction[layer] == pytest.approx(expected, rel=1e-4)
        chosen = torch.cat(choices).tolist()
        gone = [[expert not in keep[layer] for expert in row] for row in chosen]
        assert result.lost_tokens[layer] == pytest.approx(sum(map(any, gone)) / len(gone))
        assert result.lost_choices[layer] == pytest.approx(sum(map(sum, gone)) / sum(map(len, gone)))
        assert result.experts[layer] == len(keep[layer])
        assert expected > 1e-3, "the variant must change something"


@pytest.mark.parametrize("family", COUNTS)
def test_a_variant_costs_what_the_pruned_model_costs(family: str, tmp_path: Path) -> None:
    large = build(family)
    checkpoint = Checkpoint.open(plain(tmp_path / "m", family))
    variant = Variant("five", outcomes(KEEP, blocks(large)))
    # So few tokens a batch that there are several batches, and so many that documents share one, padded.
    same = Variant("all", outcomes(dict.fromkeys(KEEP, tuple(range(EXPERTS))), blocks(large)))
    unchanged, [result, other] = compare_variants(
        checkpoint, DOCUMENTS, [variant, same], window=20, batch_tokens=24, divergence=True
    )
    assert result.divergence == pytest.approx(divergence(large, sliced(family, KEEP)), rel=1e-3)
    assert other.divergence == 0
    assert unchanged.nll == pytest.approx(likelihoods(large), abs=1e-4)
    assert unchanged.tokens == (11, 6, 0, 14, 8)
    assert unchanged.domains == ("a", "b", "b", "a", "b")
    check(result, sliced(family, KEEP), large, KEEP)


def test_variants_do_not_disturb_each_other_and_may_lie_in_files(tmp_path: Path) -> None:
    large = build("qwen2_moe")
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen2_moe"))
    other = {0: (0, 1, 2), 1: (3, 4, 5, 6, 7)}  # unevenly many
    doubled = Variant("doubled", outcomes(KEEP, (0, 1)), lambda layer, w: _double(w.select(KEEP[layer])))
    variants = [
        Variant("five", outcomes(KEEP, (0, 1))),
        Variant("uneven", outcomes(other, (0, 1))),
        doubled,
        Variant("one choice", outcomes(KEEP, (0, 1)), top_k=1),
        Variant("all", outcomes(dict.fromkeys((0, 1), tuple(range(EXPERTS))), (0, 1))),
    ]
    unchanged, results = compare_variants(checkpoint, DOCUMENTS, variants, window=20)
    assert [r.name for r in results] == ["five", "uneven", "doubled", "one choice", "all"]
    check(results[0], sliced("qwen2_moe", KEEP), large, KEEP)
    check(results[1], sliced("qwen2_moe", other), large, other)
    twice = sliced("qwen2_moe", KEEP)
    for block in blocks(twice).values():
        block.experts.down_proj.data *= 2  # type: ignore[union-attr, operator]
    check(results[2], twice, large, KEEP)
    check(results[3], sliced("qwen2_moe", KEEP, num_experts_per_tok=1), large, KEEP)
    assert results[4].perplexity.nll == unchanged.nll
    assert set(results[4].reconstruction.values()) == {0.0}
    assert set(results[4].lost_tokens.values()) == {0.0}
    again = compare_variants(checkpoint, DOCUMENTS, variants, window=20, limit=0)
    assert again == (unchanged, results)
    (tmp_path / "states").mkdir()
    assert compare_variants(checkpoint, DOCUMENTS, variants, window=20, folder=tmp_path / "states") == again


def _double(weights: LayerWeights) -> LayerWeights:
    return dataclasses.replace(weights, down_EHI=weights.down_EHI * 2)


def test_long_documents_are_read_in_the_windows_of_a_whole_model(tmp_path: Path) -> None:
    long = [Document(tokens(1, 40, seed=9)[0].tolist(), "a"), *DOCUMENTS]
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "mixtral"))
    unchanged, [result] = compare_variants(checkpoint, long, [Variant("five", outcomes(KEEP, (0, 1)))], window=16)
    for found, model in ((unchanged, build("mixtral")), (result.perplexity, sliced("mixtral", KEEP))):
        whole = perplexity_of_documents(model, long, window=16)
        assert found.tokens == whole.tokens
        assert found.nll == pytest.approx(whole.nll, abs=1e-4)


def test_two_variants_of_one_name_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "mixtral"))
    twins = [Variant("five", outcomes(KEEP, (0, 1)))] * 2
    with pytest.raises(BadConfig, match="one name"):
        compare_variants(checkpoint, DOCUMENTS, twins)


def test_fewer_experts_than_choices_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "mixtral"))
    alone = Variant("one", {0: LayerOutcome(keep=(3,)), 1: LayerOutcome(keep=(3,))})
    with pytest.raises(BadConfig, match="each token chooses 2"):
        compare_variants(checkpoint, DOCUMENTS, [alone])
