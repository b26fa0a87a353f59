"""Tables that name the experts of every token id, when some of the experts go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.layout import prepare
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.token_table import preferences, renumbered
from moekit.errors import UnsupportedModel
from tests.families import EXPERTS, TOP_K
from tests.odd_families import build

KEEP = LayerOutcome(keep=(0, 2, 3))
# Expert 1 points almost as 3 does, 4 as 0 does.
ROUTER = torch.tensor([[1.0, 0, 0], [0.2, 0, 1], [0, 1, 0], [0, 0, 5], [1, 0.1, 0]])


def test_worked_example() -> None:
    order = preferences(KEEP, 5, ROUTER)
    assert order.tolist() == [[0, 1, 2], [2, 0, 1], [1, 0, 2], [2, 0, 1], [0, 1, 2]]
    table = torch.tensor([[0, 2], [1, 0], [1, 3], [4, 1], [1, 4], [4, 0]], dtype=torch.int32)
    made = renumbered(table, order, KEEP)
    # 1 -> 3, or 0 where 3 is there already; 4 -> 0, or 2 where 0 is.
    assert made.tolist() == [[0, 1], [2, 0], [0, 2], [0, 2], [2, 0], [1, 0]]
    assert made.dtype == table.dtype


def test_without_the_routers_rows_the_next_number_follows() -> None:
    assert preferences(KEEP, 5).tolist() == [[0, 1, 2], [1, 2, 0], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


def test_a_merged_expert_is_followed_by_what_it_went_into() -> None:
    merged = LayerOutcome(keep=(0, 2, 3), sources=((0,), (2, 1), (3, 4)))
    order = preferences(merged, 5, ROUTER)
    assert [row[0] for row in order.tolist()] == [0, 1, 1, 2, 2]
    assert renumbered(torch.tensor([[1, 4], [2, 1]]), order, merged).tolist() == [[1, 2], [1, 2]]


def test_what_stays_keeps_its_place_for_every_token_and_none_is_named_twice() -> None:
    table = torch.rand(20_000, 9, generator=torch.Generator().manual_seed(0)).topk(4)[1]
    outcome = LayerOutcome(keep=(1, 3, 4, 8))
    router = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    made = renumbered(table, preferences(outcome, 9, router), outcome)
    assert made.sort(1).values.tolist() == [[0, 1, 2, 3]] * len(table)
    for new, old in enumerate(outcome.keep):
        assert bool((made[table == old] == new).all())


def test_another_number_of_choices_is_refused_before_any_work(tmp_path: Path) -> None:
    model = build("deepseek_v4")
    model.save_pretrained(tmp_path / "m")
    keep = dict.fromkeys(range(2), LayerOutcome(keep=tuple(range(EXPERTS))))
    says = f"tid2eid names {TOP_K} experts of every token id, and 1 are to be chosen"
    with pytest.raises(UnsupportedModel, match=says):
        prepare(Checkpoint.open(tmp_path / "m"), keep, top_k=1)
    with pytest.raises(UnsupportedModel, match=says):
        change_model(model, keep, top_k=1)


def test_experts_beside_a_table_are_rewritten_in_their_own_type(tmp_path: Path) -> None:
    """In a shard the table's whole numbers come first."""
    build("deepseek_v4").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    source = Checkpoint.open(tmp_path / "m")
    outcomes = dict.fromkeys(range(2), LayerOutcome(keep=tuple(range(1, EXPERTS))))
    keep = outcomes[0].keep
    apply(source, outcomes, tmp_path / "cut", record=Record(command="test"))
    apply(
        source,
        outcomes,
        tmp_path / "made",
        rewrite=lambda layer, weights: weights.select(keep),
        record=Record(command="test"),
    )
    cut, made = (Checkpoint.open(tmp_path / name) for name in ("cut", "made"))
    assert all(info.dtype == source.tensors[name].dtype for name, info in made.tensors.items())
    assert all(torch.equal(made.read(name), cut.read(name)) for name in cut.tensors)
