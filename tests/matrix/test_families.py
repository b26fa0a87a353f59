"""Every MoE family of the installed transformers: pruned as plain indexing would, or refused before any work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from moekit.family import discover
from moekit.family.registry import family
from moekit.family.rules import EXPERTS
from moekit.jobs.trials.cell import Cell, attempt
from moekit.jobs.trials.pair import Pair
from moekit.jobs.trials.trial import STEPS, Trial

# One of each kind of layout that the matrix of methods does not have; the others are tried by `make test-all`.
QUICK = ("qwen3_next", "switch_transformers")
QUICK_STEPS = ("build", "load", "prune", "stock", "check", "quantize", "slim", "train")
NAMES = [entry.name for entry in discover()]
# What no message may say of a folder that is as its family writes it.
UNTRUE = (
    *("fetch it again", "is not a Mixture of Experts", "a fault of moekit", "no tensor belongs to routed experts"),
    *("give the unquantized checkpoint", "quantize this expert again"),
)

# Families on which something is not yet as it should be, and what. An entry that has become untrue fails.
NOT_YET: dict[str, str] = {}

# What is not trained by the next token of a text, and says so.
UNTRAINED = ("diffusion_gemma", "nllb-moe", "switch_transformers")


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if name in QUICK else (pytest.mark.full, pytest.mark.slow)


def _known(request: pytest.FixtureRequest, name: str) -> None:
    if name in NOT_YET:
        request.node.add_marker(pytest.mark.xfail(strict=True, reason=NOT_YET[name]))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as ranks:
        yield ranks


@pytest.fixture(scope="module", params=[pytest.param(name, marks=_marks(name), id=name) for name in NAMES])
def trial(request: pytest.FixtureRequest, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """A family that was tried, with its folders; read-only."""
    folder = tmp_path_factory.mktemp(request.param)
    made = Trial(family(request.param), folder, pair=pair)
    made.run(QUICK_STEPS if request.param in QUICK else STEPS)
    yield made
    shutil.rmtree(folder)


def test_a_family_is_pruned_as_plain_indexing_would_or_refused_before_any_work(
    trial: Trial, request: pytest.FixtureRequest
) -> None:
    _known(request, trial.family.name)
    cell = trial.cells["prune"]
    if cell.state == "refused":
        assert cell.when == "before work", cell.message
        return
    assert cell.state == "yes", cell.message
    assert trial.pruned is not None
    kept = {row["layer"]: row["kept"] for row in trial.pruned.layers}
    assert all(len(keep) == EXPERTS // 2 for keep in kept.values())
    expected, found = sliced(trial.folder / "model", trial.folder / "pruned", kept), stock(trial.folder / "pruned")
    weights = expected.state_dict()
    assert weights.keys() == found.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in found.state_dict().items())
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-5, atol=1e-6)
    assert trial.cells["stock"].state == trial.cells["check"].state == "yes"


def test_a_family_trains_one_step_and_loses_no_tensor(trial: Trial, request: pytest.FixtureRequest) -> None:
    name, cell = trial.family.name, trial.cells["train"]
    if name in UNTRAINED or trial.cells["load"].state == "refused":
        assert (cell.state, cell.when) == ("refused", "before work"), cell.message
        return
    _known(request, name)
    assert cell.state == "yes", cell.message
    before, after = stored(trial.folder / "model"), stored(trial.folder / "trained")
    assert before.keys() <= after.keys()
    assert all((before[key].dtype, before[key].shape) == (after[key].dtype, after[key].shape) for key in before)
    changed = [key for key, tensor in before.items() if not torch.equal(tensor, after[key])]
    assert all(before[key].is_floating_point() for key in changed)
    # Experts that no token of one row chose, and what is fixed, stay; most others move. Of an Omni model its thinker
    # learns, and nothing else.
    learns = [key for key in before if key.startswith("thinker.")] or list(before)
    assert set(changed) <= set(learns)
    assert len(changed) > len(learns) // 4


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def test_no_message_is_untrue_of_a_valid_folder(trial: Trial, request: pytest.FixtureRequest) -> None:
    _known(request, trial.family.name)
    assert trial.cells["build"].state == "yes", trial.cells["build"].message
    for step, cell in trial.cells.items():
        assert not [told for told in UNTRUE if told in cell.message], f"{step}: {cell.message}"
        assert cell.state != "failed", f"{step}: {cell.message}"


def stock(folder: Path) -> PreTrainedModel:
    """The folder's model, by the class that its config names."""
    kind: Any = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    found: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return found


def sliced(source: Path, pruned: Path, kept: Mapping[int, list[int]]) -> PreTrainedModel:
    """The source's weights in a model of the smaller config: where shapes differ, the experts that were kept."""
    whole = stock(source)
    config = type(whole.config).from_pretrained(pruned)
    small: PreTrainedModel = type(whole)._from_config(config, dtype=torch.float32)
    shapes = {name: tensor.shape for name, tensor in small.state_dict().items()}
    read_first = whole.config.num_hidden_layers if getattr(whole.config, "is_encoder_decoder", False) else 0
    state = {}
    for name, tensor in whole.state_dict().items():
        named = renamed(name, kept, read_first)
        if named is not None:
            same = tensor.shape == shapes[named]
            state[named] = tensor if same else indexed(tensor, shapes[named], kept[layer_of(name, read_first)])
    for name, table in state.items():
        if table.dim() == 2 and not table.is_floating_point():  # the experts of every token id
            router = whole.get_parameter(f"{name.rpartition('.')[0]}.weight")
            state[name] = renumbered(table, router, kept[layer_of(name)])
    small.load_state_dict(state, strict=True)
    return small.eval()


def renumbered(table: Tensor, router: Tensor, keep: list[int]) -> Tensor:
    """Row by row: who is gone is followed by the kept one whose row of the router is most like it and not there yet."""
    like = torch.nn.functional.cosine_similarity(router[:, None].double(), router[None].double(), dim=2).tolist()
    made = []
    for row in table.tolist():
        there = [expert for expert in row if expert in keep]
        new = []
        for expert in row:
            if expert not in keep:
                expert = max((e for e in keep if e not in there), key=lambda e: like[expert][e])
                there.append(expert)
            new.append(keep.index(expert))
        made.append(new)
    return torch.tensor(made)


def layer_of(name: str, read_first: int = 0) -> int:
    """Number of a tensor's layer; a decoder's follow those of its encoder, `read_first` of them."""
    found = re.search(r"(?:(encoder|decoder)\.)?(?:layers|blocks?)\.(\d+)\.", name)
    assert found is not None, name
    return int(found[2]) + (read_first if found[1] == "decoder" else 0)


def renamed(name: str, kept: Mapping[int, list[int]], read_first: int = 0) -> str | None:
    """What a tensor is called where only some experts are left, each a module of its own; None where it is gone."""
    found = re.search(r"\.experts\.expert_(\d+)\.", name)
    if found is None:
        return name
    keep = kept[layer_of(name, read_first)]
    if int(found[1]) not in keep:
        return None
    return name.replace(found[0], f".experts.expert_{keep.index(int(found[1]))}.")


def indexed(tensor: Tensor, shape: torch.Size, keep: list[int]) -> Tensor:
    """Rows of the kept experts, along the only axis that is to become shorter."""
    (axis,) = [axis for axis in range(tensor.dim()) if tensor.shape[axis] != shape[axis]]
    rows = tensor.transpose(0, axis)
    before, after = rows.shape[0], shape[axis]
    if before - after == EXPERTS - len(keep):  # a row an expert, and rows of no expert behind them
        chosen = rows[torch.tensor([*keep, *range(EXPERTS, before)])]
    else:  # several rows an expert
        assert before % EXPERTS == 0
        assert after == before // EXPERTS * len(keep)
        chosen = rows.unflatten(0, (EXPERTS, -1))[torch.tensor(keep)].flatten(0, 1)
    return chosen.transpose(0, axis)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(4, 100, (3, 17), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    # What only holds other models has no forward pass of its own; text goes through the one that writes it.
    runs = getattr(model, "thinker", model)
    further = {"decoder_input_ids": ids.flip(1)} if getattr(model.config, "is_encoder_decoder", False) else {}
    found: Tensor = runs(input_ids=ids, use_cache=False, **further).logits
    assert bool(found.isfinite().all())
    return found


def test_indexing_takes_rows_of_experts_wherever_they_stand() -> None:
    plain = torch.arange(EXPERTS * 6).view(EXPERTS, 6)
    assert indexed(plain, torch.Size((2, 6)), [1, 4]).tolist() == [plain[1].tolist(), plain[4].tolist()]
    assert torch.equal(indexed(plain.T, torch.Size((6, 2)), [1, 4]), plain[[1, 4]].T)
    behind = torch.arange(EXPERTS + 1)
    assert indexed(behind, torch.Size((3,)), [1, 4]).tolist() == [1, 4, EXPERTS]
    several = torch.arange(EXPERTS * 3)
    assert indexed(several, torch.Size((6,)), [1, 4]).tolist() == [3, 4, 5, 12, 13, 14]


def test_layers_of_a_decoder_follow_its_encoders() -> None:
    assert layer_of("model.layers.3.mlp.gate.weight") == 3
    assert layer_of("encoder.block.1.layer.1.mlp.router.classifier.weight", 4) == 1
    assert layer_of("decoder.block.1.layer.2.mlp.router.classifier.weight", 4) == 5


def test_experts_that_are_modules_are_called_by_their_new_number() -> None:
    kept = {1: [0, 3], 5: [2, 3]}
    inside = "layer.1.mlp.experts.expert_3.wi.weight"
    assert renamed(f"encoder.block.1.{inside}", kept, 4) == f"encoder.block.1.{inside.replace('_3', '_1')}"
    assert renamed(f"decoder.block.1.{inside.replace('_3', '_0')}", kept, 4) is None
    assert renamed("encoder.block.1.layer.0.SelfAttention.q.weight", kept, 4) == (
        "encoder.block.1.layer.0.SelfAttention.q.weight"
    )


def test_what_is_known_not_to_work_is_a_family() -> None:
    assert {*NOT_YET, *QUICK, *UNTRAINED} <= set(NAMES)


def test_attempts_are_told_apart() -> None:
    model = transformers.MixtralForCausalLM._from_config(
        transformers.MixtralConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )

    def works() -> str:
        return "done"

    def refuses() -> None:
        raise moekit_error

    def works_then_breaks() -> None:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
        raise ZeroDivisionError("none")

    from moekit.errors import UnsupportedModel

    moekit_error = UnsupportedModel("no", hint="another")
    cell, found = attempt(works)
    assert (cell.state, found) == ("yes", "done")
    refused: Cell = attempt(refuses)[0]
    assert (refused.state, refused.when, refused.message) == ("refused", "before work", "no\n  -> another")
    broken = attempt(works_then_breaks)[0]
    assert (broken.state, broken.when, broken.message) == ("failed", "after work", "ZeroDivisionError: none")
