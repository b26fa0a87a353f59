"""Odd models are dealt out, or refused with the reason before anything is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moekit.errors import UnsupportedModel
from moekit.parallel import expert_mesh, expert_parallel
from tests.odd_families import build


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("dbrx", "layer 0: DbrxExperts holds its experts otherwise than as stacks"),
        ("llama4_text", "is called with"),
        ("longcat_flash", "3 experts that hold no weights"),
    ],
)
def test_experts_of_another_form_are_refused(alone: None, family: str, says: str) -> None:
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModel) as told:
        expert_parallel(model, expert_mesh(1))
    assert says in str(told.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_router_that_is_given_more_than_hidden_states_is_called_by_its_block(alone: None) -> None:
    model, ids = build("afmoe"), torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        expert_parallel(model, expert_mesh(1))
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-6)
