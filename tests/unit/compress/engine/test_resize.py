"""Blocks of another size: sizes and attributes as the family's own code makes them, weights where they belong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moekit.anatomy import find_moe_layers
from moekit.anatomy.probe import MoELayer
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.resize import empty_block, read_block, resized_block, resized_config
from moekit.errors import BadConfig, UnsupportedModel
from tests.families import EXPERTS, FAMILIES, HIDDEN, WIDTH, build

# What each family calls its number of experts and of choices, from its configuration's documentation.
EXPERTS_KEY = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_local_experts"}
EXPERTS_KEY |= {"olmoe": "num_experts", "deepseek_v2": "n_routed_experts", "deepseek_v3": "n_routed_experts"}
EXPERTS_KEY |= {"glm4_moe": "n_routed_experts", "gpt_oss": "num_local_experts", "phimoe": "num_local_experts"}
EXPERTS_KEY |= {"granitemoe": "num_local_experts", "ernie4_5_moe": "moe_num_experts"}
TOP_K_KEY = {"ernie4_5_moe": "moe_k"}

FIRST = LayerOutcome(keep=(0, 1, 2, 3))


def first_layer(model: PreTrainedModel) -> MoELayer:
    return find_moe_layers(model)[0]


def ints(module: nn.Module) -> dict[str, int]:
    """All whole numbers that modules of a tree hold, by path."""
    return {
        f"{name}.{key}": value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if type(value) is int
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_nothing_asked_gives_an_equal_config(family: str) -> None:
    config = FAMILIES[family]()
    made = resized_config(config, EXPERTS)
    assert made is not config
    assert made.to_dict() == config.to_dict()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"phimoe"}))
def test_a_config_says_its_new_numbers_by_the_familys_names(family: str) -> None:
    config = FAMILIES[family]()
    before = config.to_dict()
    made = resized_config(config, 5, top_k=1).to_dict()
    expected = before | {EXPERTS_KEY[family]: 5, TOP_K_KEY.get(family, "num_experts_per_tok"): 1}
    if "n_group" in before:
        expected |= {"n_group": 1, "topk_group": 1}
    assert made == expected
    assert config.to_dict() == before, "the old config stays"


def test_a_nested_config_is_resized_inside() -> None:
    from transformers import Qwen3_5MoeConfig

    config = Qwen3_5MoeConfig(text_config={"num_experts": 8, "num_experts_per_tok": 2})
    made = resized_config(config, 4, top_k=1)
    assert (made.get_text_config().num_experts, made.get_text_config().num_experts_per_tok) == (4, 1)
    assert config.get_text_config().num_experts == 8


def test_fewer_experts_than_choices_are_refused_with_the_legal_values() -> None:
    with pytest.raises(BadConfig) as refused:
        resized_config(FAMILIES["mixtral"](), 1)
    assert "at least 2" in (refused.value.hint or "")
    assert "--top-k 1" in (refused.value.hint or "")
    assert resized_config(FAMILIES["mixtral"](), 1, top_k=1).num_local_experts == 1


@pytest.mark.parametrize("top_k", [0, -1])
def test_a_token_must_choose_someone(top_k: int) -> None:
    with pytest.raises(BadConfig, match="choose"):
        resized_config(FAMILIES["mixtral"](), 4, top_k=top_k)


def test_a_router_that_always_chooses_two() -> None:
    config = FAMILIES["phimoe"]()
    assert resized_config(config, 5, top_k=2).num_local_experts == 5
    with pytest.raises(BadConfig, match="always chooses 2"):
        resized_config(config, 5, top_k=1)


def test_groups_go_where_any_layer_loses_experts() -> None:
    config = FAMILIES["deepseek_v3"]()
    assert resized_config(config, EXPERTS, dropped=True).n_group == 1
    assert resized_config(config, EXPERTS, dropped=False).n_group == 4


def test_no_expert_at_all_is_refused() -> None:
    with pytest.raises(BadConfig):
        resized_config(FAMILIES["mixtral"](), 0, top_k=0)


def test_equal_groups_stay_and_must_divide() -> None:
    config = FAMILIES["deepseek_v2"]()  # 4 groups, of which a token may use 2
    made = resized_config(config, 4, groups="equal")
    assert (made.n_group, made.topk_group) == (4, 2)
    with pytest.raises(BadConfig, match="4 routing groups"):
        resized_config(config, 6, groups="equal")


def test_groups_too_small_to_be_scored_are_refused() -> None:
    # DeepSeek-V3 scores a group by its two best experts; DeepSeek-V2 by its best.
    config = FAMILIES["deepseek_v3"]()
    with pytest.raises(BadConfig) as refused:
        resized_config(config, 4, groups="equal")
    assert "8" in (refused.value.hint or "")
    with pytest.raises(BadConfig):
        resized_config(config, 1, top_k=1)
    assert resized_config(config, 2, top_k=1).n_routed_experts == 2
    assert resized_config(FAMILIES["deepseek_v2"](), 1, top_k=1).n_routed_experts == 1


def test_a_config_without_experts() -> None:
    from transformers import LlamaConfig

    with pytest.raises(UnsupportedModel, match="number of experts"):
        resized_config(LlamaConfig(), 4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_empty_block_is_the_familys_own(family: str) -> None:
    config = resized_config(FAMILIES[family](), 5)
    layer = first_layer(build(family))
    name = layer.name
    block = empty_block(config, layer)
    expected = build(
        family, **{EXPERTS_KEY[family]: 5} | ({"n_group": 1, "topk_group": 1} if "n_group" in config else {})
    )
    real = expected.get_submodule(name)
    assert all(parameter.is_meta for parameter in block.parameters())
    assert {n: t.shape for n, t in block.state_dict().items()} == {n: t.shape for n, t in real.state_dict().items()}
    assert ints(block) == ints(real), "num_experts of router, experts and block, top-k and groups"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_weights_through_a_block_of_the_same_size(family: str) -> None:
    model = build(family)
    layer = first_layer(model)
    made = resized_block(layer, model.config, read_block(layer), LayerOutcome(keep=tuple(range(EXPERTS))))
    old = layer.block.state_dict()
    assert list(made.state_dict()) == list(old)
    assert all(torch.equal(tensor, old[name]) for name, tensor in made.state_dict().items())


@pytest.mark.parametrize("experts", [HIDDEN, WIDTH], ids=["as-wide-as-the-model", "as-wide-as-an-expert"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_as_many_experts_as_something_is_wide(family: str, experts: int) -> None:
    model = build(family, **{EXPERTS_KEY[family]: experts})
    layer = first_layer(model)
    keep = [0, 3, 7, 8, 21]
    made = resized_block(
        layer, resized_config(model.config, len(keep)), read_block(layer).select(keep), LayerOutcome(keep=tuple(keep))
    )
    router = layer.router_name.removeprefix(f"{layer.name}.")
    down = layer.experts_name.removeprefix(f"{layer.name}.") + ".down_proj"
    old, new = layer.block.state_dict(), made.state_dict()
    assert torch.equal(new[down], old[down][keep])
    matrices = [n for n in old if n.startswith(f"{router}.") and old[n].dim() == 2 and old[n].shape[0] == experts]
    assert len(matrices) == 1
    assert torch.equal(new[matrices[0]], old[matrices[0]][keep])


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "ernie4_5_moe"])
def test_what_counts_no_experts_is_shared(family: str) -> None:
    model = build(family)
    layer = first_layer(model)
    made = resized_block(layer, resized_config(model.config, 4), read_block(layer).select([0, 1, 2, 3]), FIRST)
    old, new = dict(layer.block.named_parameters()), dict(made.named_parameters())
    shared = [name for name in new if "shared" in name]
    assert shared
    assert all(new[name] is old[name] for name in shared)


@pytest.mark.parametrize("trains", [False, True])
def test_mode_dtype_and_gradients_follow_the_old_block(trains: bool) -> None:
    model = build("deepseek_v3").to(torch.bfloat16).requires_grad_(trains).train(trains)
    layer = first_layer(model)
    made = resized_block(layer, resized_config(model.config, 4), read_block(layer).select([0, 1, 2, 3]), FIRST)
    old = layer.block.state_dict(keep_vars=True)
    for name, tensor in made.state_dict(keep_vars=True).items():
        assert (tensor.dtype, tensor.requires_grad) == (old[name].dtype, old[name].requires_grad), name
    assert {module.training for module in made.modules()} == {trains}


def test_new_weights_are_no_views_of_the_old() -> None:
    model = build("mixtral")
    layer = first_layer(model)
    before = copy.deepcopy(layer.block.state_dict())
    made = resized_block(
        layer, model.config, read_block(layer).select(range(EXPERTS)), LayerOutcome(keep=tuple(range(EXPERTS)))
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    after: dict[str, Tensor] = layer.block.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_wrong_number_of_weights_is_refused() -> None:
    model = build("mixtral")
    layer = first_layer(model)
    config: PreTrainedConfig = resized_config(model.config, 4)
    with pytest.raises(UnsupportedModel) as refused:
        resized_block(layer, config, read_block(layer).select([0, 1, 2]), LayerOutcome(keep=(0, 1, 2)))
    assert refused.value.layer == layer.index
