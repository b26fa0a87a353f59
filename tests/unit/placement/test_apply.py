"""A placement carried out changes no logits, in memory and on disk, for every family; what would is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moekit
from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.model import load, save
from moekit.checkpoint.record import Record
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import BadConfig, UnsupportedModel
from moekit.placement.apply import apply_placement, permute_all, place_checkpoint, routing_groups
from moekit.placement.plan import Placement
from moekit.placement.planning import place
from moekit.routing.methods.c2r import C2R, partner_lists
from moekit.routing.plan import RoutingPlan, plan_routing
from moekit.runtime import attached
from tests.families import EXPERTS, FAMILIES, build, logits
from tests.unit.placement.samples import counts_of, skewed_choices

GROUPS = {"deepseek_v2": 4, "deepseek_v3": 4, "glm4_moe": 2}


def a_placement(model: torch.nn.Module, devices: int = 4, **options: object) -> Placement:
    """A placement that moves experts in every layer: devices renumbered, so that whole groups move too."""
    counts = {
        layer.index: counts_of(skewed_choices(300, EXPERTS, 2, seed=layer.index + 5), EXPERTS)
        for layer in find_moe_layers(model)
    }
    groups = routing_groups(model.config)
    found = place(counts, devices, solver="swap", routing_groups=groups, **options)
    step = max(1, devices // groups) if groups > 1 else 1
    layers = {layer: [(d + step) % devices for d in held] for layer, held in found.layers.items()}
    placement = found.model_copy(update={"layers": layers})
    assert all(order != list(range(EXPERTS)) for order in placement.orders().values())
    return placement


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_groups_that_limit_routing(family: str) -> None:
    assert routing_groups(build(family).config) == GROUPS.get(family, 1)


def test_groups_that_limit_nothing() -> None:
    assert routing_groups({"n_group": 4, "topk_group": 4}) == 1
    assert routing_groups({"n_group": 4, "topk_group": 2, "topk_method": "greedy"}) == 1
    assert routing_groups({"n_group": None, "topk_group": None}) == 1
    assert routing_groups({"text_config": {"n_group": 8, "topk_group": 4}}) == 8


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_live_model(family: str, devices: int) -> None:
    model = build(family)
    before = logits(model)
    weights = {layer.index: layer.experts.down_proj.clone() for layer in find_moe_layers(model)}
    placement = a_placement(model, devices)
    apply_placement(model, placement)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    for layer in find_moe_layers(model):
        assert torch.equal(layer.experts.down_proj, weights[layer.index][placement.order(layer.index)])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_checkpoint_opens_in_stock_transformers_with_equal_logits(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = logits(model)
    save(model, tmp_path / "plain", record=Record(command="test"))
    placement = a_placement(model)
    record = place_checkpoint(tmp_path / "plain", placement, tmp_path / "placed")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "placed", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock), before, atol=1e-5, rtol=1e-5)
    plain, placed = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(tmp_path / "placed")
    assert placed.config == plain.config
    assert {n: i.shape for n, i in placed.tensors.items()} == {n: i.shape for n, i in plain.tensors.items()}
    assert placed.fingerprint == record.fingerprint != plain.fingerprint
    assert record.parent_fingerprint == plain.fingerprint
    assert record.plan_hash == placement.hash
    # Logical experts can be restored from the record.
    again = Record.read(tmp_path / "placed")
    assert again is not None
    orders = {int(layer): order for layer, order in again.config["orders"].items()}
    back = {layer: sorted(range(EXPERTS), key=order.__getitem__) for layer, order in orders.items()}
    permute_all(stock, back)
    for one, other in zip(find_moe_layers(stock), find_moe_layers(model), strict=True):
        assert torch.equal(one.experts.down_proj, other.experts.down_proj)


def test_tokenizer_and_licence_come_along_but_no_stale_index(tmp_path: Path) -> None:
    model = build("mixtral")
    save(model, tmp_path / "plain", record=Record(command="test"), max_shard_bytes=20_000)
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    (tmp_path / "plain" / "LICENSE").write_text("free")
    (tmp_path / "plain" / "notes.py").write_text("raise SystemExit")
    assert (tmp_path / "plain" / "model.safetensors.index.json").exists()
    place_checkpoint(tmp_path / "plain", a_placement(model), tmp_path / "placed")
    names = {p.name for p in (tmp_path / "placed").iterdir()}
    assert {"tokenizer.json", "LICENSE", "config.json", "generation_config.json", "moekit.json", "README.md"} <= names
    assert "model.safetensors" in names
    assert "model.safetensors.index.json" not in names
    assert "notes.py" not in names


def c2r_plan(model: torch.nn.Module) -> RoutingPlan:
    layers = find_moe_layers(model)
    counts = {n.index: counts_of(skewed_choices(200, EXPERTS, 2, seed=n.index), EXPERTS) for n in layers}
    return plan_routing(layers, C2R(top_t=3), "c2r", {n: {"coactivation": c} for n, c in counts.items()})


def test_policy_lists_follow_in_memory() -> None:
    model = build("qwen2_moe")
    plan = c2r_plan(model)
    stock = logits(model)
    plan.apply(model)
    before = logits(model)
    assert not torch.allclose(before, stock, atol=1e-4)
    apply_placement(model, a_placement(model))
    assert len(attached(model)) == 1
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_policy_lists_follow_on_disk(tmp_path: Path) -> None:
    model = build("qwen2_moe")
    c2r_plan(model).apply(model)
    before = logits(model)
    moekit.save(model, tmp_path / "c2r", record=Record(command="test"))
    place_checkpoint(tmp_path / "c2r", a_placement(model), tmp_path / "placed")
    torch.testing.assert_close(
        logits(moekit.load(tmp_path / "placed", dtype=torch.float32, device="cpu")), before, atol=1e-5, rtol=1e-5
    )


def test_partner_lists_of_a_placed_model_are_the_permuted_ones() -> None:
    """Planning on permuted counts gives the lists that permuting the plan gives, but for ties."""
    counts = counts_of(skewed_choices(5000, EXPERTS, 2), EXPERTS)
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    moved = C2R(top_t=3).permute({"partners": partner_lists(counts).to(torch.int16)}, order)["partners"]
    assert torch.equal(moved[:, :-1].long(), partner_lists(counts[order][:, order])[:, :-1])


@pytest.mark.parametrize("family", sorted(GROUPS))
def test_torn_routing_groups_are_refused(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = logits(model)
    indices = [layer.index for layer in find_moe_layers(model)]
    torn = Placement(devices=2, experts=EXPERTS, layers={n: [0, 1] * (EXPERTS // 2) for n in indices}, solver="by hand")
    with pytest.raises(BadConfig, match="mixes routing groups") as caught:
        apply_placement(model, torn)
    assert caught.value.layer == indices[0]
    assert f"routing_groups={GROUPS[family]}" in str(caught.value)
    assert torch.equal(logits(model), before)
    save(model, tmp_path / "plain", record=Record(command="test"))
    with pytest.raises(BadConfig, match="mixes routing groups"):
        place_checkpoint(tmp_path / "plain", torn, tmp_path / "placed")
    assert not (tmp_path / "placed").exists()


def test_all_layers_or_none() -> None:
    """Layer 2's order tears groups; layer 1, moved before it, is moved back."""
    model = build("deepseek_v3")
    before = {layer.index: layer.experts.down_proj.clone() for layer in find_moe_layers(model)}
    with pytest.raises(UnsupportedModel):
        permute_all(model, {1: [2, 3, 0, 1, 5, 4, 6, 7], 2: [0, 2, 1, 3, 4, 6, 5, 7]})
    for layer in find_moe_layers(model):
        assert torch.equal(layer.experts.down_proj, before[layer.index])


def test_unequal_blocks_need_a_word(tmp_path: Path) -> None:
    model = build("olmoe")
    before = logits(model)
    save(model, tmp_path / "plain", record=Record(command="test"))
    uneven = a_placement(model, devices=3)
    with pytest.raises(BadConfig, match="not equal"):
        place_checkpoint(tmp_path / "plain", uneven, tmp_path / "placed")
    place_checkpoint(tmp_path / "plain", uneven, tmp_path / "placed", equal=False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "placed", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock), before, atol=1e-5, rtol=1e-5)


def test_another_model(tmp_path: Path) -> None:
    model = build("mixtral")
    placement = a_placement(model)
    with pytest.raises(BadConfig, match="made for model"):
        apply_placement(model, placement.model_copy(update={"fingerprint": "other"}))
    with pytest.raises(BadConfig, match="no MoE layer"):
        apply_placement(model, Placement(devices=2, experts=8, layers={7: [0, 1] * 4}, solver="by hand"))
    with pytest.raises(BadConfig, match="6 experts here"):
        apply_placement(model, Placement(devices=2, experts=6, layers={0: [0, 1] * 3}, solver="by hand"))
    save(model, tmp_path / "plain", record=Record(command="test"))
    other = placement.model_copy(update={"fingerprint": "other"})
    with pytest.raises(BadConfig, match="made for model"):
        place_checkpoint(tmp_path / "plain", other, tmp_path / "placed")
    placement.model_copy(update={"fingerprint": Checkpoint.open(tmp_path / "plain").fingerprint})


def test_fingerprint_of_the_live_model_is_accepted(tmp_path: Path) -> None:
    save(build("mixtral"), tmp_path / "plain", record=Record(command="test"))
    model = load(tmp_path / "plain", device="cpu")
    own = Checkpoint.open(tmp_path / "plain").fingerprint
    apply_placement(model, a_placement(model, fingerprint=own))


def test_extra_tensors_nobody_knows_are_refused(tmp_path: Path) -> None:
    model = build("mixtral")
    save(model, tmp_path / "plain", record=Record(command="test"), extra_tensors={"layers.0.scale": torch.ones(8)})
    with pytest.raises(BadConfig, match=r"layers\.0\.scale"):
        place_checkpoint(tmp_path / "plain", a_placement(model), tmp_path / "placed")
    assert not (tmp_path / "placed").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    model = build("mixtral")
    save(model, tmp_path / "plain", record=Record(command="test"))
    with pytest.raises(BadConfig, match="exists"):
        place_checkpoint(tmp_path / "plain", a_placement(model), tmp_path / "plain")
    place_checkpoint(tmp_path / "plain", a_placement(model), tmp_path / "plain", overwrite=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


def test_layers_with_different_numbers_of_experts_are_placed(tmp_path: Path) -> None:
    kept = {0: LayerOutcome(keep=(0, 2, 5)), 1: LayerOutcome(keep=(1, 2, 3, 4, 6, 7))}
    moekit.save(change_model(build("mixtral"), kept), tmp_path / "uneven")
    model = moekit.load(tmp_path / "uneven", dtype=torch.float32, device="cpu")
    layers = {0: [1, 0, 1], 1: [1, 0, 0, 1, 0, 1]}
    fingerprint = Checkpoint.open(tmp_path / "uneven").fingerprint
    placement = Placement(fingerprint=fingerprint, devices=2, experts=6, layers=layers, solver="by hand")
    place_checkpoint(tmp_path / "uneven", placement, tmp_path / "placed", equal=False)
    placed = moekit.load(tmp_path / "placed", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(placed), logits(model), atol=1e-5, rtol=1e-5)
