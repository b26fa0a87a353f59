"""A task's experts loaded alone, on every family, split and fused: the folder that would be written, no other byte."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.outcome import LayerOutcome
from moekit.serving.expert_sets.expert_set import ExpertSet, keep_sets, make_expert_set
from moekit.serving.expert_sets.loading import load_task
from tests.checkpoints import plain
from tests.contracts import CONTRACT
from tests.families import EXPERTS, FAMILIES, logits, tokens

KEEP = 5
# Every family as it is stored as a rule; stacked, one of each contract, and the others in the long run.
LAYOUTS = [
    pytest.param(
        family,
        fused,
        id=f"{family}-{'fused' if fused else 'split'}",
        marks=(pytest.mark.full, pytest.mark.slow) if fused and family not in CONTRACT else (),
    )
    for family in sorted(FAMILIES)
    for fused in (False, True)
]


def any_expert_set(checkpoint: Checkpoint, seed: int = 4) -> ExpertSet:
    generator = torch.Generator().manual_seed(seed)
    scores = {layer: torch.randn(EXPERTS, generator=generator) for layer in geometries_of(checkpoint)}
    return make_expert_set("maths", scores, tokens=1, fingerprint=checkpoint.fingerprint)


def written(checkpoint: Checkpoint, keep: Mapping[int, Sequence[int]], folder: Path) -> PreTrainedModel:
    """The folder that `apply` writes for the same outcome, as stock transformers opens it."""
    outcomes = {layer: LayerOutcome(keep=tuple(experts)) for layer, experts in keep.items()}
    apply(checkpoint, outcomes, folder, record=Record(command="a test"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        # Mapped weights lie anywhere; kernels round the last bit by where they lie.
        tensor.data = tensor.data.clone()
    return model


@pytest.mark.parametrize(("family", "fused"), LAYOUTS)
def test_a_loaded_task_is_the_folder_that_would_be_written(family: str, fused: bool, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", family, fused=fused))
    expert_set = any_expert_set(checkpoint)
    model = load_task(str(tmp_path / "m"), expert_set, KEEP, device="cpu")
    other = written(checkpoint, keep_sets(expert_set, KEEP), tmp_path / "out")
    mine, theirs = model.state_dict(), other.state_dict()
    assert sorted(mine) == sorted(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(model), logits(other))
    told = [{k: v for k, v in m.config.to_dict().items() if k != "_name_or_path"} for m in (model, other)]
    assert told[0] == told[1]
    assert model.generation_config.to_dict() == other.generation_config.to_dict()
    said = [m.generate(tokens(1), max_new_tokens=3, do_sample=False, pad_token_id=0) for m in (model, other)]
    assert torch.equal(said[0], said[1])


def dropped(checkpoint: Checkpoint, keep: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
    """Byte ranges of all experts that are not kept, told by names and shapes alone."""
    ranges = []
    for name, info in checkpoint.tensors.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) not in keep or "shared" in name:
            continue
        gone = [expert for expert in range(EXPERTS) if expert not in keep[int(layer[1])]]
        start, end = info.offsets
        if single := re.search(r"experts\.(\d+)\.", name):
            ranges += [(start, end)] * (int(single[1]) in gone)
        elif "experts" in name or "put_linear" in name:  # as GraniteMoE calls them on disk
            size = (end - start) // EXPERTS
            ranges += [(start + expert * size, start + (expert + 1) * size) for expert in gone]
    return ranges


@pytest.mark.parametrize(("family", "fused"), LAYOUTS)
def test_no_byte_of_another_expert_is_read(
    family: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", family, fused=fused))
    assert len(checkpoint.shards) == 1
    expert_set = any_expert_set(checkpoint)
    gone = dropped(checkpoint, keep_sets(expert_set, KEEP))
    assert gone
    read: list[tuple[int, int]] = []
    stock = os.preadv

    def counted(file: int, buffers: Any, offset: int, *flags: int) -> int:
        got = stock(file, buffers, offset, *flags)
        read.append((offset, offset + got))
        return got

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the shard was mapped")

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr("safetensors.safe_open", never)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", never)
    load_task(checkpoint, expert_set, KEEP, device="cpu")
    for start, end in read:
        assert not any(start < last and first < end for first, last in gone)
    # Each byte once; of the routers a few rows less, too.
    amount = sum(end - start for start, end in read)
    most = checkpoint.nbytes - sum(end - start for start, end in gone)
    assert 0.9 * most < amount <= most
