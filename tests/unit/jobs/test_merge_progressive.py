"""`use: merge` with a method that decides behind the merged layers: what it writes, and going on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.errors import BadConfig
from moekit.jobs.context import JobContext
from moekit.jobs.options.merge import MergeOptions
from moekit.jobs.shared.inputs import load_tokenizer, read_text, rows_of
from moekit.jobs.weights.fewer_job import check
from moekit.jobs.weights.sizes import budget_of
from moekit.trace.streamed import Streamed
from tests.tiny import write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_text(folder / "text", documents=20)
    return folder


def step(made: Path, **options: Any) -> MergeOptions:
    asked = {"model": made / "moe", "method": "ream", "keep": 4, "data": made / "text"}
    return MergeOptions(**{**asked, **options})


def place(folder: Path, name: str = "out") -> JobContext:
    return JobContext(out=folder / name, scratch=folder / f"scratch-{name}", seed=0, command="a test")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_it_decides_on_its_own_pass_and_proves_against_pruning(made: Path, tmp_path: Path) -> None:
    results = step(made, plan=str(tmp_path / "p.json")).run(place(tmp_path))
    baselines = [told["name"] for told in results["proof"]["baselines"]]
    assert baselines == ["reap", "frequency", "random-groups"]
    plan = WeightPlan.load(tmp_path / "p.json")
    options = step(made)
    tokenizer = load_tokenizer(str(made / "moe"))
    documents = read_text(str(made / "text"), split="train")
    length = min(options.seq_len, 128)
    rows = rows_of(documents, tokenizer, seq_len=length, max_tokens=options.max_tokens)
    text = CalibrationText(list(rows.batches(options.batch_size)))
    request = PlanRequest(plan.method, budget_of(4, "uniform", None, None))
    assert plan_weights(Checkpoint.open(made / "moe"), text, request).outcomes == plan.outcomes
    assert all(outcome.merges for outcome in plan.outcomes.values())


class _Killed(Exception):
    pass


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    at: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(made, proof=False).run(place(tmp_path, "whole"))
    own, ran = Streamed._layer, list[int]()

    def layer(self: Streamed, index: int, *rest: Any) -> None:
        if len(ran) == at:
            raise _Killed
        ran.append(index)
        own(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Streamed, "_layer", layer)
        with pytest.raises(_Killed):
            step(made, proof=False).run(place(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Streamed, "_layer", lambda self, index, *rest: (ran.append(index), own(self, index, *rest))[1])
        step(made, proof=False).run(place(tmp_path))
    assert ran == [0, 1, 0, 1], "each layer once as it is, and once behind the merged ones"
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.full
@pytest.mark.slow
def test_layers_may_share_the_budget(made: Path, tmp_path: Path) -> None:
    results = step(made, scope="global", keep=5, proof=False, write="plan").run(place(tmp_path, "plan.json"))
    assert sum(len(layer["kept"]) for layer in results["layers"]) == 10


def test_no_trace_says_what_merged_layers_give(made: Path) -> None:
    asked = step(made, data=None, heldout=str(made / "text"), trace=str(made / "trace"))
    with pytest.raises(BadConfig, match="ream runs layers on text, which a trace does not hold"):
        check(asked)
    with pytest.raises(BadConfig, match="ream runs layers on text"):
        check(step(made, data=None, heldout=str(made / "text")))
    check(step(made, data=None, heldout=str(made / "text"), trace=str(made / "trace"), settings={"mode": "layerwise"}))
