"""Plans on disk: what they may not overwrite, and what makes two of them equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekit.checkpoint import Checkpoint
from moekit.checkpoint.expected import verify
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import PlanRequest
from moekit.compress.prune.dern import DERN
from moekit.errors import BadConfig, BadData
from moekit.trace.streamed import record_streamed
from tests.families import build


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, WeightPlan, WeightPlan]:
    """A model, and two plans that keep the same experts, the second protecting one of them."""
    folder = tmp_path_factory.mktemp("made") / "m"
    build("qwen3_moe").save_pretrained(folder)
    checkpoint, method = Checkpoint.open(folder), DERN(alpha=0.0)
    rows = [torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))]
    trace = record_streamed(checkpoint, rows, statistics=method.required)
    free = plan_weights(checkpoint, trace, PlanRequest(method, Budget(keep=4)))
    one = {0: free.outcomes[0].keep[:1]}
    return checkpoint, free, plan_weights(checkpoint, trace, PlanRequest(method, Budget(keep=4), protected=one))


def test_protection_makes_another_plan(made: tuple[Checkpoint, WeightPlan, WeightPlan]) -> None:
    _, free, protecting = made
    assert free.outcomes == protecting.outcomes
    assert free.hash != protecting.hash


def test_weights_are_not_taken_for_statistics(made: tuple[Checkpoint, WeightPlan, WeightPlan], tmp_path: Path) -> None:
    checkpoint, plan, _ = made
    with pytest.raises(BadConfig, match="no plan's statistics"):
        plan.save(checkpoint.path / "model.json")
    verify(Checkpoint.open(checkpoint.path))
    with pytest.raises(BadConfig, match=r"a plan is a \.json file"):
        plan.save(tmp_path / "keep-0.5")
    assert list(tmp_path.iterdir()) == []
    plan.save(tmp_path / "p.json")
    plan.save(tmp_path / "p.json")
    assert WeightPlan.load(tmp_path / "p.json").hash == plan.hash


def test_statistics_of_another_plan(made: tuple[Checkpoint, WeightPlan, WeightPlan], tmp_path: Path) -> None:
    _, plan, _ = made
    plan.save(tmp_path / "p.json")
    other = WeightPlan(plan.file, {})
    other.save(tmp_path / "q.json")
    (tmp_path / "q.safetensors").replace(tmp_path / "p.safetensors")
    with pytest.raises(BadData, match=r"not the statistics that p\.json was written with"):
        WeightPlan.load(tmp_path / "p.json")
