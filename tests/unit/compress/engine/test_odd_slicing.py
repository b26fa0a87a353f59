"""Experts of odd families are dropped as plain indexing of tensors drops them, or refused before any work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.layout import prepare
from moekit.compress.engine.live import change_model
from moekit.compress.engine.measuring import geometries_of, sizes_of
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import UnsupportedModel
from tests.families import EXPERTS, HIDDEN, WIDTH, logits
from tests.odd_families import build

KEEP = (1, 2, 4, 5, 7)
ONE = (1, 0)
# family -> end of a tensor's name on disk -> rows of each expert, rows behind them that belong to none
ROWS: dict[str, dict[str, tuple[int, int]]] = {
    "afmoe": {".expert_bias": ONE, ".router.gate.weight": ONE},
    "hy_v3": {".expert_bias": ONE, ".router.gate.weight": ONE},
    "lfm2_moe": {".expert_bias": ONE, ".feed_forward.gate.weight": ONE},
    "minimax_m2": {".e_score_correction_bias": ONE, ".block_sparse_moe.gate.weight": ONE},
    "llama4_text": {".experts.down_proj": ONE, ".experts.gate_up_proj": ONE, ".router.weight": ONE},
    "aria_text": {".experts.fc1.weight": ONE, ".experts.fc2.weight": ONE, ".router.weight": ONE},
    "inkling2_text": {
        ".experts.w13_weight": ONE, ".experts.w2_weight": ONE, ".mlp.gate.bias": ONE, ".mlp.gate.weight": ONE,
    },
    "inkling_text": {
        ".experts.gate_up_proj": ONE, ".mlp.experts.down_proj": ONE, ".gate.e_score_correction_bias": ONE,
        ".mlp.gate.weight": (1, 2),
    },
    "zaya": {
        ".experts.down_proj": ONE, ".experts.gate_up_proj": ONE, ".gate.balancing_biases": (1, 1),
        ".router_mlp.out_proj.weight": (1, 1),
    },
    "longcat_flash": {".router.classifier.weight": (1, 3), ".router.e_score_correction_bias": (1, 3)},
    "deepseek_v4": {
        ".ffn.gate.weight": ONE, ".ffn.gate.bias": ONE,
    },
    "dbrx": {".mlp.w1": (WIDTH, 0), ".mlp.v1": (WIDTH, 0), ".mlp.w2": (WIDTH, 0), ".router.layer.weight": ONE},
}  # fmt: skip


def index_of(rows: tuple[int, int]) -> Tensor:
    each, behind = rows
    own = [expert * each + row for expert in KEEP for row in range(each)]
    return torch.tensor([*own, *range(EXPERTS * each, EXPERTS * each + behind)])


def sliced_by_hand(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, split, tail = name.partition(".experts.")
        number = tail.split(".")[0]
        if split and number.isdigit():
            expert, rest = int(number), tail.partition(".")[2]
            if expert in KEEP:
                made[f"{head}.experts.{KEEP.index(expert)}.{rest}"] = tensor
            elif expert >= EXPERTS:  # LongCat's copies of the input
                made[f"{head}.experts.{expert - EXPERTS + len(KEEP)}.{rest}"] = tensor
            continue
        if name.endswith("tid2eid"):
            made[name] = renumbered_by_hand(tensor, tensors[name.replace("tid2eid", "weight")])
            continue
        rows = next((rows for end, rows in ROWS[family].items() if name.endswith(end)), None)
        made[name] = tensor if rows is None else tensor[index_of(rows)].contiguous()
    return made


def renumbered_by_hand(table: Tensor, router: Tensor) -> Tensor:
    """Row by row: who is gone is followed by the kept one that is most like it and not there yet."""
    like = torch.nn.functional.cosine_similarity(router[:, None].double(), router[None].double(), dim=2).tolist()
    made = []
    for row in table.tolist():
        there = [expert for expert in row if expert in KEEP]
        new = []
        for expert in row:
            if expert not in KEEP:
                expert = max((kept for kept in KEEP if kept not in there), key=lambda kept: like[expert][kept])
                there.append(expert)
            new.append(KEEP.index(expert))
        made.append(new)
    return torch.tensor(made)


def with_fewer(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    changed = {key: len(KEEP) for key in keys if config.get(key) == EXPERTS}
    inside = {k: with_fewer(v) for k, v in config.items() if isinstance(v, dict) and "moe_num_experts" in v}
    return config | changed | inside


def folder_by_hand(source: Path, target: Path, family: str) -> Path:
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(with_fewer(config)))
    made = sliced_by_hand(load_file(source / "model.safetensors"), family)
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    return target


def stock(folder: Path) -> PreTrainedModel:
    """As stock transformers loads it; a copy, as results on the CPU depend on where tensors begin in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    made: PreTrainedModel = copy.deepcopy(model).eval()
    return made


def saved(folder: Path, family: str) -> Path:
    build(family).save_pretrained(folder)
    return folder


def outcomes(model: PreTrainedModel) -> dict[int, LayerOutcome]:
    return {layer.index: LayerOutcome(keep=KEEP) for layer in find_moe_layers(model)}


@pytest.mark.parametrize("family", sorted(ROWS))
def test_dropping_is_plain_indexing(family: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "m", family)
    by_hand = stock(folder_by_hand(source, tmp_path / "hand", family))
    before = stock(source)
    checkpoint = Checkpoint.open(source)
    apply(checkpoint, outcomes(before), tmp_path / "out", record=Record(command="a test"))
    expected = load_file(tmp_path / "hand" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    pruned = stock(tmp_path / "out")
    assert torch.equal(logits(pruned), logits(by_hand))
    assert torch.equal(logits(copy.deepcopy(change_model(copy.deepcopy(before), outcomes(before)))), logits(by_hand))
    assert not torch.allclose(logits(by_hand), logits(before), atol=1e-3), "removing experts must change something"
    assert all(layer.geometry.experts == len(KEEP) for layer in find_moe_layers(pruned))


@pytest.mark.parametrize("family", ["afmoe", "minimax_m2", "aria_text", "zaya"])
def test_experts_are_merged_on_disk_as_in_memory(family: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "m", family)
    before = stock(source)
    merged = {n: LayerOutcome(keep=KEEP, sources=((1, 0), (2, 3), (4,), (5, 6), (7,))) for n in outcomes(before)}
    apply(Checkpoint.open(source), merged, tmp_path / "out", record=Record(command="a test"))
    live = copy.deepcopy(change_model(copy.deepcopy(before), merged))
    assert torch.equal(logits(stock(tmp_path / "out")), logits(live))
    mean = live.get_parameter(f"{find_moe_layers(live)[0].experts_name}.down_proj")[0]
    own = before.get_parameter(f"{find_moe_layers(before)[0].experts_name}.down_proj")
    torch.testing.assert_close(mean, (own[0] + own[1]) / 2)


@pytest.mark.parametrize("family", ["aria_text", "inkling2_text", "dbrx", "longcat_flash"])
def test_bytes_of_experts_whose_names_do_not_tell_them(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(saved(tmp_path / "m", family))
    sizes = sizes_of(checkpoint, geometries_of(checkpoint))
    width = geometries_of(checkpoint)[0].width
    idle = 3 * 2 * WIDTH * HIDDEN * 4 if family == "longcat_flash" else 0  # rows that belong to no expert
    assert sizes.expert_bytes[0] == (EXPERTS * 3 * width * HIDDEN * 4 + idle) // EXPERTS


def test_weights_of_an_odd_layer_in_the_common_layout(tmp_path: Path) -> None:
    source = saved(tmp_path / "m", "llama4_text")
    weights = weights_reader_of(source)
    live = stock(source).model.layers[0].feed_forward.experts
    assert torch.equal(weights.down_EHI, live.down_proj.transpose(1, 2))
    assert torch.equal(weights.gate_EIH, live.gate_up_proj[:, :, :WIDTH].transpose(1, 2))
    assert torch.equal(weights.up_EIH, live.gate_up_proj[:, :, WIDTH:].transpose(1, 2))


def weights_reader_of(source: Path) -> Any:
    from moekit.compress.engine.resize import read_block

    model = stock(source)
    return read_block(find_moe_layers(model)[0], model.config)


def test_a_width_that_other_parts_share_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(saved(tmp_path / "m", "llama4_text"))
    outcomes = {n: LayerOutcome(keep=tuple(range(EXPERTS)), width=WIDTH // 2) for n in geometries_of(checkpoint)}
    with pytest.raises(UnsupportedModel, match="width of routed experts is that of other parts"):
        prepare(checkpoint, outcomes)


def test_what_cannot_be_dropped_is_refused_before_any_work(tmp_path: Path) -> None:
    family, says = "jetmoe", r"self_attention\.experts.* counts experts, too"
    checkpoint = Checkpoint.open(saved(tmp_path / "m", family))
    model = build(family)
    with pytest.raises(UnsupportedModel, match=says) as told:
        prepare(checkpoint, outcomes(model))
    assert "profile" in str(told.value)
    with pytest.raises(UnsupportedModel, match=says):
        change_model(model, outcomes(model))
    every = {n: LayerOutcome(keep=tuple(range(EXPERTS))) for n in outcomes(model)}
    assert prepare(checkpoint, every).nbytes > 0


def test_a_router_of_more_rows_that_fits_no_count_is_told_truthfully(tmp_path: Path) -> None:
    source = saved(tmp_path / "m", "zaya")
    tensors = load_file(source / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.gate.router_mlp.out_proj.weight"))
    tensors[name] = torch.zeros(EXPERTS + 2, tensors[name].shape[1])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match="has no axis") as told:
        prepare(Checkpoint.open(source), outcomes(build("zaya")))
    assert "unquantized" not in str(told.value)
