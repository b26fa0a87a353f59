"""Experts and the tensors of parts reordered together compute the same, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moekit
from moekit.anatomy import permute_experts
from moekit.catalogue import MethodRecord
from moekit.placement import Placement
from moekit.placement.apply import place_checkpoint
from moekit.runtime import attach, permute_parts, without_parts
from moekit.runtime.axes import permuted
from moekit.runtime.part import RuntimePart
from tests.families import EXPERTS, build, logits
from tests.parts import Gain, Nudge, Recurrence, learned, stir
from tests.runtime_cases import cases, hang

KINDS = ("routing", "block", "experts")

# Keeps the groups of two and of four that grouped families choose among.
ORDER = [5, 4, 6, 7, 1, 0, 3, 2]


@pytest.mark.parametrize(("record", "family"), cases(KINDS))
def test_in_memory(record: MethodRecord, family: str) -> None:
    model = build(family)
    attachment = hang(model, family, record)
    stir(model)
    before, tensors = logits(model), learned(model)
    orders = dict.fromkeys(attachment.layers, ORDER)
    with without_parts(model):
        permute_experts(model, orders)
    permute_parts(model, orders)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert all(learned(model)[name] is tensor for name, tensor in tensors.items()), "an optimizer keeps its tensors"


@pytest.mark.parametrize("part", [Nudge(), Recurrence(), Gain()], ids=lambda part: type(part).__name__)
def test_on_disk(part: RuntimePart, tmp_path: Path) -> None:
    model = build("qwen3_moe")
    attachment = attach(model, part)
    stir(model)
    moekit.save(model, tmp_path / "m")
    devices = {layer: [e % 2 for e in range(EXPERTS)] for layer in attachment.layers}
    place_checkpoint(tmp_path / "m", Placement(devices=2, experts=EXPERTS, layers=devices, solver="x"), tmp_path / "p")
    placed = moekit.load(tmp_path / "p", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(placed), logits(model), atol=1e-5, rtol=1e-5)
    moved = any(not torch.equal(learned(placed)[n], p) for n, p in learned(model).items())
    assert moved


def test_axes_by_hand() -> None:
    lists = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 2]], dtype=torch.int16)
    # New expert 0 was 2, 1 was 0, 2 was 1: so 2 -> 0, 0 -> 1, 1 -> 2.
    assert permuted(lists, "ER->E", [2, 0, 1]).tolist() == [[1, 2, 0], [2, 0, 1], [0, 1, 2]]
    assert permuted(torch.tensor([[9.0, 8.0], [7.0, 6.0], [5.0, 4.0]]), "EM", [2, 0, 1]).tolist() == [
        [5.0, 4.0],
        [9.0, 8.0],
        [7.0, 6.0],
    ]
    assert permuted(torch.tensor([0, -1, 2]), "P->E", [2, 0, 1]).tolist() == [1, -1, 0]
    counts = torch.tensor([[0, 1], [2, 3]])
    assert permuted(counts, "EE", [1, 0]).tolist() == [[3, 2], [1, 0]]
    assert permuted(torch.tensor(4.0), "", [1, 0]) == 4
