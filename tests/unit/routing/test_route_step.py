"""`moekit route`: what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from moekit.checkpoint import Checkpoint
from moekit.errors import BadConfig
from moekit.placement import Placement
from moekit.recipe.steps.base import Workplace
from moekit.recipe.steps.route import RouteStep
from tests.families import EXPERTS
from tests.tiny import write_model


def test_a_placement_of_another_model_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    layers = {0: [0, 1] * (EXPERTS // 2), 1: [1, 0] * (EXPERTS // 2)}
    known = {"devices": 2, "experts": EXPERTS, "layers": layers, "objective": {0: 0.5, 1: 0.5}, "solver": "by-hand"}
    own = Placement(**known, fingerprint=Checkpoint.open(model).fingerprint)
    other = Placement(**known, fingerprint="0" * 64)
    for name, placement in (("own", own), ("other", other)):
        placement.save(tmp_path / f"{name}.json")
    settings = {"mode": "device"}

    def route(placement: str) -> None:
        step = RouteStep(
            model=str(model), method="c2r", settings=settings, placement=str(tmp_path / f"{placement}.json")
        )
        step.run(Workplace(out=tmp_path / f"plan-{placement}", scratch=tmp_path / "scratch"))

    route("own")
    with pytest.raises(BadConfig, match="placement was made for model 000000000000"):
        route("other")
    assert not (tmp_path / "plan-other").exists()
