"""What has stayed is byte for byte the parent's, in whichever layout; what is not is named with layer and expert."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import moekit
from moekit.checking import CheckReport, Finding, check
from moekit.checkpoint import Checkpoint, Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.outcome import LayerOutcome
from moekit.conversion.methods.residual import Residual
from moekit.placement import Placement, place_checkpoint
from tests.checkpoints import edit_json, edit_shard, plain
from tests.odd_folders import tensors_of, with_mtp, with_mtp_stack
from tests.tiny import tokenizer, write_model, write_text
from tests.unit.conversion.conftest import dense_model

KEEP = {0: (1, 2, 4, 5, 7), 1: (0, 1, 2, 3, 6)}
Tensors = dict[str, torch.Tensor]


def flip(tensor: torch.Tensor) -> None:
    """The lowest bit of the last number."""
    tensor.view(-1).view(torch.uint8)[-tensor.element_size()] ^= 1


def lose(tensors: Tensors, name: str) -> None:
    del tensors[name]


def errors(report: CheckReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.severity == "error"]


def damaged(child: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy with other tensors, whose record has no digests any more: only the parent can tell."""
    shutil.copytree(child, target)
    (shard,) = target.glob("model*.safetensors")
    edit_shard(shard, change)
    edit_json(target / "moekit.json", lambda record: record.update(expectations={}, fingerprint=None))
    return target


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A parent and its pruned child, split and stacked; and a child split where its parent is stacked."""
    folder = tmp_path_factory.mktemp("family")
    outcomes = {layer: LayerOutcome(keep=kept) for layer, kept in KEEP.items()}
    record = Record(command="prune", config={"kind": "prune", "method": "reap"})
    made = {"split": plain(folder / "split"), "stacked": plain(folder / "stacked", fused=True)}
    for name, parent in list(made.items()):
        apply(Checkpoint.open(parent), outcomes, folder / f"{name}-child", record=record)
        made[f"{name}-child"] = folder / f"{name}-child"
    told = Record(
        command="prune",
        parent=str(made["stacked"]),
        parent_fingerprint=Checkpoint.open(made["stacked"]).fingerprint,
        config={"kind": "prune", "method": "reap"},
        scores={"kept": {str(layer): list(kept) for layer, kept in KEEP.items()}},
    )
    moekit.save(moekit.load(made["split-child"], device="cpu"), folder / "mixed-child", record=told)
    return {**made, "mixed": made["stacked"], "mixed-child": folder / "mixed-child"}


KINDS = ["split", "stacked", "mixed"]


def expert(tensors: Tensors, layer: int, number: int) -> dict[str, torch.Tensor]:
    """Gate, up and down of an expert, as views."""
    stem = f"model.layers.{layer}.mlp.experts."
    if f"{stem}gate_up_proj" in tensors:
        gate, up = tensors[f"{stem}gate_up_proj"][number].chunk(2)
        return {"gate": gate, "up": up, "down": tensors[f"{stem}down_proj"][number]}
    return {part: tensors[f"{stem}{number}.{part}_proj.weight"] for part in ("gate", "up", "down")}


def exchange(first: torch.Tensor, second: torch.Tensor) -> None:
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_child_is_proven(kind: str, family: dict[str, Path]) -> None:
    stacks = [any(n.endswith("experts.down_proj") for n in tensors_of(family[k])) for k in (kind, f"{kind}-child")]
    assert stacks == {"split": [False, False], "stacked": [True, True], "mixed": [True, False]}[kind]
    report = check(family[f"{kind}-child"], parent=family[kind])
    assert report.findings == []
    told = " ".join(report.proven)
    assert "every expert is its counterpart" in told
    # Of two layers: four of attention, two norms, three and one of the shared expert; embedding, head and last norm.
    # Biases of queries, keys and values besides.
    assert f"{2 * (4 + 3 + 2 + 4) + 3} tensors outside of routed experts are byte for byte" in told


@pytest.mark.parametrize("kind", KINDS)
def test_two_kept_experts_swapped(kind: str, family: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for part in ("gate", "up", "down"):
            exchange(expert(tensors, 1, 1)[part], expert(tensors, 1, 3)[part])

    found = errors(check(damaged(family[f"{kind}-child"], tmp_path / "m", change), parent=family[kind]))
    assert {(f.code, f.layer) for f in found} <= {("experts-swapped", 1), ("expert-replaced", 1)}
    assert found[0].expert == 1
    # It is what the parent calls 3, and the child's third expert what the parent calls 1.
    assert "3" in found[0].message


@pytest.mark.parametrize("kind", KINDS)
def test_gate_and_up_of_one_expert_swapped(kind: str, family: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        exchange(expert(tensors, 0, 2)["gate"], expert(tensors, 0, 2)["up"])

    found = errors(check(damaged(family[f"{kind}-child"], tmp_path / "m", change), parent=family[kind]))
    assert {(f.code, f.layer, f.expert) for f in found} == {("gate-up-swapped", 0, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_of_an_expert(kind: str, family: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for number in (4, 3):
            flip(expert(tensors, 1, number)["down"])

    (found,) = errors(check(damaged(family[f"{kind}-child"], tmp_path / "m", change), parent=family[kind]))
    assert (found.code, found.layer, found.expert) == ("expert-changed", 1, 3)
    assert "(down)" in found.message
    assert "the first of 2 experts" in found.message


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attn.q_proj.weight", "mlp.gate.weight"])
def test_one_bit_outside_of_experts(name: str, family: dict[str, Path], tmp_path: Path) -> None:
    name = f"model.layers.1.{name}"
    child = damaged(family["split-child"], tmp_path / "m", lambda tensors: flip(tensors[name]))
    report = check(child, parent=family["split"])
    (found,) = errors(report)
    assert (found.code, found.layer) == ("changed-from-parent", 1)
    assert name in found.message
    assert not any("outside of routed experts" in line for line in report.proven if "gate" not in name)
    (child / "moekit.json").unlink()
    alone = check(child, parent=family["split"])
    assert alone.ok  # nobody says that it stayed
    told = [f.message for f in alone.findings if f.code == "differs-from-parent"]
    assert told == ([] if "gate" in name else [f"{name} is not the parent's, byte for byte"])


def test_a_method_that_rewrites_experts_may(family: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for number in range(5):
            expert(tensors, 0, number)["down"].mul_(1.01)

    child = damaged(family["split-child"], tmp_path / "m", change)
    edit_json(child / "moekit.json", lambda record: record["config"].update(method="dern"))
    assert check(child, parent=family["split"]).ok
    edit_shard(next(child.glob("model*.safetensors")), lambda tensors: flip(tensors["model.norm.weight"]))
    (found,) = errors(check(child, parent=family["split"]))
    assert "model.norm.weight" in found.message


@pytest.mark.parametrize("cut", [False, True])
def test_a_lost_tensor_of_a_layer_that_looks_ahead(cut: bool, tmp_path: Path) -> None:
    source, _ = with_mtp(tmp_path / "source")
    checkpoint = Checkpoint.open(source)
    keep = (0, 2, 5) if cut else tuple(range(8))
    outcomes = {layer: LayerOutcome(keep=keep) for layer in geometries_of(checkpoint)}
    how: dict[str, Any] = {"mtp": "prune", "mtp_kept": {"model.layers.2.": (1, 4, 6)}} if cut else {"mtp": "keep"}
    apply(
        checkpoint,
        outcomes,
        tmp_path / "m",
        record=Record(command="prune", config={"kind": "prune", "method": "reap"}),
        **how,
    )
    assert check(tmp_path / "m", parent=source).findings == []
    for number, lost in enumerate(("enorm.weight", "mlp.experts.2.up_proj.weight")):
        child = damaged(tmp_path / "m", tmp_path / str(number), partial(lose, name=f"model.layers.2.{lost}"))
        (found,) = (f for f in errors(check(child, parent=source)) if f.code == "lost-tensors")
        theirs = lost.replace("experts.2", "experts.6") if cut else lost
        assert f"model.layers.2.{theirs}" in found.message
    swapped = damaged(
        tmp_path / "m", tmp_path / "x", lambda t: exchange(expert(t, 2, 0)["down"], expert(t, 2, 2)["down"])
    )
    found = errors(check(swapped, parent=source))[0]
    assert (found.layer, found.expert) == (2, 0)


def test_a_lost_tensor_of_a_stack_that_no_config_announces(tmp_path: Path) -> None:
    source = with_mtp_stack(tmp_path / "source")
    shutil.copytree(source, tmp_path / "m")
    edit_shard(tmp_path / "m" / "model.safetensors", lambda t: lose(t, "mtp.layers.0.post_attention_layernorm.weight"))
    (found,) = errors(check(tmp_path / "m", parent=source))
    assert found.code == "lost-tensors"
    assert "mtp.layers.0.post_attention_layernorm.weight" in found.message


def test_a_placed_child_is_the_parents_in_another_order(family: dict[str, Path], tmp_path: Path) -> None:
    parent = family["split"]
    devices = {0: [0, 1, 0, 1, 0, 1, 0, 1], 1: [1, 1, 1, 1, 0, 0, 0, 0]}
    placement = Placement(
        devices=2, experts=8, layers=devices, fingerprint=Checkpoint.open(parent).fingerprint, solver="by hand"
    )
    place_checkpoint(parent, placement, tmp_path / "placed")
    assert errors(check(tmp_path / "placed", parent=parent)) == []
    child = damaged(tmp_path / "placed", tmp_path / "m", lambda t: flip(expert(t, 0, 5)["up"]))
    (found,) = errors(check(child, parent=parent))
    assert (found.code, found.layer, found.expert) == ("expert-changed", 0, 5)


@pytest.mark.full
@pytest.mark.slow
def test_a_converted_child_has_the_dense_models_attention(tmp_path: Path) -> None:
    dense = dense_model("llama", num_hidden_layers=2)
    dense.save_pretrained(tmp_path / "dense")
    moe = Residual(experts=4, top_k=2, width=16).convert(dense)
    fingerprint = Checkpoint.open(tmp_path / "dense").fingerprint
    record = Record(
        command="convert", parent=str(tmp_path / "dense"), parent_fingerprint=fingerprint, config={"method": "residual"}
    )
    moekit.save(moe, tmp_path / "moe", record=record)
    assert errors(check(tmp_path / "moe", parent=tmp_path / "dense")) == []
    name = "model.layers.0.self_attn.v_proj.weight"
    child = damaged(tmp_path / "moe", tmp_path / "m", lambda t: flip(t[name]))
    (found,) = errors(check(child, parent=tmp_path / "dense"))
    assert (found.code, found.layer) == ("changed-from-parent", 0)
    assert name in found.message


@pytest.mark.full
@pytest.mark.slow
def test_a_converted_and_a_trained_child_pass(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", documents=4)
    dense_model("llama", num_hidden_layers=1, vocab_size=128).save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    settings = {"experts": 4, "top_k": 2, "width": 16}
    moekit.convert(tmp_path / "dense", method="residual", settings=settings, out=tmp_path / "moe")
    assert errors(check(tmp_path / "moe", parent=tmp_path / "dense")) == []
    moekit.train(
        tmp_path / "moe", data=text, settings={"steps": 2, "seq_len": 32, "batch": 2}, out=tmp_path / "trained"
    )
    report = check(tmp_path / "trained", parent=tmp_path / "moe")
    assert errors(report) == []
    # The down projections were zeros: they say nothing, and accuse no expert.
    assert any(finding.code == "zeros-say-nothing" for finding in report.findings)


@pytest.mark.full
@pytest.mark.slow
def test_a_routed_child_is_the_parent(tmp_path: Path) -> None:
    write_model(tmp_path / "plain", "qwen3_moe")
    moekit.route(tmp_path / "plain", method="topk", settings={"top_k": 1}, write="model", out=tmp_path / "routed")
    assert errors(check(tmp_path / "routed", parent=tmp_path / "plain")) == []
    child = damaged(tmp_path / "routed", tmp_path / "m", lambda t: flip(t["lm_head.weight"]))
    (found,) = errors(check(child, parent=tmp_path / "plain"))
    assert "lm_head.weight" in found.message
