"""Models whose experts cannot be dealt out are refused with the reason, before anything is cut."""

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
    [("dbrx", "layer 0: DbrxExperts holds its experts otherwise than as stacks"), ("llama4_text", "is called with")],
)
def test_experts_of_another_form_are_refused(alone: None, family: str, says: str) -> None:
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModel) as told:
        expert_parallel(model, expert_mesh(1))
    assert says in str(told.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
