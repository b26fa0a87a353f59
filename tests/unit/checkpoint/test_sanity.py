"""Configs that no router can follow are refused as the folder is opened, and so are weights without their scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.checkpoint.estimate import estimate
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.sanity import check_config
from moekit.errors import BadCheckpoint
from moekit.jobs.estimates import ByteSizes
from moekit.jobs.shared.inputs import model_item
from tests.checkpoints import edit_json, edit_shard, plain

DEEPSEEK = {"n_routed_experts": 12, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2}


@pytest.mark.parametrize(
    ("config", "words", "nearest"),
    [
        ({"num_experts": 8, "num_experts_per_tok": 0}, "num_experts_per_tok is 0", "1"),
        ({"num_experts": 8, "num_experts_per_tok": -3}, "num_experts_per_tok is -3", "1"),
        ({"num_local_experts": 8, "num_experts_per_tok": 9}, "there are 8 experts", "8"),
        ({"moe_num_experts": 8, "moe_k": 0}, "moe_k is 0", "1"),
        ({"text_config": {"num_experts": 8, "num_experts_per_tok": 0}}, "num_experts_per_tok is 0", "1"),
        ({"num_experts": -1, "num_experts_per_tok": 1}, "num_experts is -1", "1"),
        (DEEPSEEK | {"n_group": 5}, "n_group is 5, which does not divide 12 experts", "4"),
        (DEEPSEEK | {"n_group": 0}, "n_group is 0", "1"),
        (DEEPSEEK | {"n_group": 99}, "n_group is 99", "12"),
        (DEEPSEEK | {"topk_group": 4}, "topk_group is 4, but there are 3 groups", "3"),
        (DEEPSEEK | {"topk_group": 0}, "topk_group is 0", "1"),
    ],
)
def test_impossible_numbers_name_the_nearest_legal_one(config: dict[str, object], words: str, nearest: str) -> None:
    with pytest.raises(BadCheckpoint, match=words) as caught:
        check_config(config, "config.json")
    assert f"nearest legal value is {nearest};" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "config",
    [
        {},
        DEEPSEEK,
        DEEPSEEK | {"n_group": None, "topk_group": None},
        DEEPSEEK | {"topk_method": "greedy", "n_group": 7},  # this family does not read it then
        {"num_experts": 0, "num_experts_per_tok": 0},  # a hybrid family's model without experts
        {"num_experts": 8, "num_experts_per_tok": 8},
        {"num_experts": 8},
    ],
)
def test_legal_numbers(config: dict[str, object]) -> None:
    check_config(config, "config.json")


def test_it_is_refused_wherever_a_model_is_opened_or_foretold(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model", "mixtral")
    edit_json(folder / "config.json", lambda config: config.update(num_experts_per_tok=0))
    for use in (Checkpoint.open, estimate, lambda f: model_item(str(f), ByteSizes())):
        with pytest.raises(BadCheckpoint, match="chooses no expert"):
            use(folder)


def quantize(folder: Path, scale: str | None) -> None:
    """Experts in fp8, with scales of this name."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            if scale is not None:
                tensors[name.removesuffix(".weight") + scale] = torch.ones(1, 1)

    edit_shard(folder / "model.safetensors", change)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))


@pytest.mark.parametrize("scale", [None, ".input_scale", ".activation_scale"])
def test_weights_in_eight_bits_without_scales_are_refused(tmp_path: Path, scale: str | None) -> None:
    folder = plain(tmp_path / "model", "mixtral")
    quantize(folder, scale)
    with pytest.raises(BadCheckpoint, match="scales are missing") as caught:
        Checkpoint.open(folder)
    assert "weight_scale_inv" in str(caught.value)
    assert (caught.value.layer, caught.value.expert) == (0, 0)


@pytest.mark.parametrize("scale", [".weight_scale_inv", ".weight_scale", ".scale", "_scale_inv"])
def test_weights_in_eight_bits_with_scales_are_opened(tmp_path: Path, scale: str) -> None:
    folder = plain(tmp_path / "model", "mixtral")
    quantize(folder, scale)
    Checkpoint.open(folder)
