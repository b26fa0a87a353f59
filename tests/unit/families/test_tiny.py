"""Families are found by their configs, and built tiny by rules: all that the installed transformers has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.checkpoint.names import text_config
from moekit.errors import BadConfig
from moekit.family import build, discover, family, holds_experts, texts, tiny_config, tokenizer, write
from moekit.family.rules import EXPERTS, FIRST_SPARE_TOKEN, VOCABULARY, chosen_layers
from tests.families import FAMILIES

FOUND = {entry.name: entry for entry in discover()}
# Of this many weights at most; a tower of convolutions has floors that no rule gets under.
MOST_WEIGHTS = 3_000_000
WRAPPERS = (
    *(
        "qwen3_vl_moe",
        "glm4v_moe",
        "qwen3_5_moe",
        "kimi_k25",
        "llama4",
        "gemma4",
        "step3p7",
        "minimax_m3_vl",
        "mistral4",
    ),
    *("aria", "ernie4_5_vl_moe"),
)
OTHER_LAYOUTS = ("dbrx", "doge", "jetmoe", "llama4_text", "nllb-moe", "switch_transformers", "longcat_flash", "zaya")


@pytest.mark.parametrize("name", [*FAMILIES, *WRAPPERS, *OTHER_LAYOUTS])
def test_known_families_are_found(name: str) -> None:
    assert name in FOUND, f"found: {sorted(FOUND)}"


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "clip", "t5"])
def test_dense_families_are_not(name: str) -> None:
    assert name not in FOUND


@pytest.mark.parametrize("name", FOUND)
def test_every_family_holds_experts(name: str) -> None:
    assert holds_experts(FOUND[name])


@pytest.mark.parametrize("name", FOUND)
def test_every_family_is_built_tiny(name: str) -> None:
    model = build(FOUND[name])
    assert type(model).__name__ == FOUND[name].architecture
    assert sum(p.numel() for p in model.parameters()) < MOST_WEIGHTS
    drawn = [p for n, p in model.named_parameters() if not n.endswith("position_ids")]
    assert all(bool(p.isfinite().all()) for p in drawn)
    inner = model.config
    for field in FOUND[name].experts_in:
        inner = getattr(inner, field)
    assert (inner if hasattr(inner, "vocab_size") else model.config).vocab_size == VOCABULARY


def test_a_wrapper_has_what_stands_beside_language() -> None:
    names = {name.split(".")[1] for name in build(FOUND["qwen3_vl_moe"]).state_dict() if name.startswith("model.")}
    assert {"visual", "language_model"} <= names


def test_equal_seeds_give_equal_models() -> None:
    one, same, other = (build(FOUND["olmoe"], seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_widths_differ_pairwise() -> None:
    config = tiny_config(FOUND["qwen2_moe"])
    widths = [
        *(config.hidden_size, config.intermediate_size, config.moe_intermediate_size),
        *(config.shared_expert_intermediate_size, config.num_experts, config.vocab_size),
    ]
    assert len(set(widths)) == len(widths)
    assert config.num_experts == EXPERTS


def test_a_written_folder_says_its_class(tmp_path: Path) -> None:
    import json

    write(FOUND["mixtral"], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert text_config(config)["num_local_experts"] == EXPERTS
    assert (tmp_path / "m" / "tokenizer.json").is_file()


def test_texts_are_within_the_vocabulary() -> None:
    made = tokenizer()
    for documents in texts(documents=3).values():
        ids = made(documents).input_ids
        assert all(3 < token < FIRST_SPARE_TOKEN for row in ids for token in row)
        assert all(made.decode(row) == text for row, text in zip(ids, documents, strict=True))


def test_layers_of_every_kind_stay() -> None:
    kinds = ["a"] * 10 + ["b"] * 5 + ["c"]
    kept = chosen_layers({"layer_types": kinds}, len(kinds), 4)
    assert [kinds[index] for index in kept] == ["a", "a", "b", "c"]


@pytest.mark.parametrize(("name", "said"), [("mixtrall", "did you mean 'mixtral'"), ("llama", "no number of experts")])
def test_what_is_no_family_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(BadConfig) as error:
        family(name)
    assert said in str(error.value)


def test_dashes_and_underscores_mean_the_same() -> None:
    assert family("nllb_moe").name == family("nllb-moe").name == "nllb-moe"
