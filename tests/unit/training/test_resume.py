"""A killed run continues as if it had not been killed; half-written checkpoints are ignored."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from moekit._progress import Progress
from moekit.anatomy import find_moe_layers
from moekit.checkpoint.atomic import lock
from moekit.errors import BadCheckpoint, BadConfig, NumericFault
from moekit.training import (
    CompleteCheckpoints,
    ExactResume,
    MoECallback,
    TrainConfig,
    TrainResult,
    last_complete_checkpoint,
    train,
)
from moekit.training.freeze import train_only
from moekit.training.resume import MARK, checkpoints, is_complete, load_changing, remove_incomplete, save_changing
from tests.contracts import FULL
from tests.families import FAMILIES, build
from tests.processes import python
from tests.unit.training.helpers import Rows, trainer
from tests.unit.training.test_run import settings, text

ROOT = Path(__file__).resolve().parents[3]

# Trains, and kills itself hard at a chosen moment.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import moekit.training.resume as resume
from tests.unit.training.test_resume import run

moment = sys.argv[2]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

class Bar:
    done = 0
    def start(self, label, total): pass
    def finish(self): pass
    def advance(self, amount=1, note=""):
        self.done += amount
        if moment == "between" and self.done == 8: die()

stock = resume.mark_complete
def mark(checkpoint):
    if moment == "unmarked" and checkpoint.name == "checkpoint-6": die()
    if moment == "truncated" and checkpoint.name == "checkpoint-6":
        stock(checkpoint)
        with open(checkpoint / "optimizer.pt", "r+b") as stream: stream.truncate(1000)
        die()
    stock(checkpoint)
resume.mark_complete = mark
if moment == "finishing":
    import moekit.training.session as module
    module.save_changing = lambda *_: die()
if moment == "full":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
run(Path(sys.argv[1]), Bar())
"""


def run(folder: Path, progress: Progress | None = None) -> TrainResult:
    torch.set_num_threads(1)
    config = TrainConfig(
        steps=13,
        batch=2,
        accumulation=2,
        seq_len=16,
        lr=1e-2,
        objectives={"balance": 0.02},
        balancer={"use": "sign", "rate": 0.01},
        save_every=3,
        parts=("router", "experts", "attention"),
    )
    return train(build("deepseek_v3"), None, text(21, padded=True), config, output=folder, progress=progress)


def launch(folder: Path, moment: str) -> CompletedProcess[str]:
    return python(["-c", SCRIPT, folder, moment])


State = dict[str, torch.Tensor]


MOMENTS = (("between", 6), ("unmarked", 3), ("truncated", 3), ("finishing", 13))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], State]:
    folder = tmp_path_factory.mktemp("unbroken")
    return run(folder).losses, load_file(folder / "training.safetensors")


@pytest.mark.parametrize(
    ("moment", "last"),
    [pytest.param(moment, last, marks=() if moment == "unmarked" else FULL) for moment, last in MOMENTS],
)
def test_a_killed_run_continues_bit_for_bit(
    moment: str, last: int, unbroken: tuple[list[float], State], tmp_path: Path
) -> None:
    killed = launch(tmp_path, moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert not (tmp_path / "train.json").exists()
    found = last_complete_checkpoint(tmp_path)
    assert found is not None
    assert found.name == f"checkpoint-{last}"
    if last == 3:
        assert [step for step, _ in checkpoints(tmp_path)] == [3, 6]  # the half-written one is there, and ignored
    result = run(tmp_path)
    assert result.resumed_from == last
    assert result.losses == unbroken[0]
    assert len(result.losses) == 13
    state = load_file(tmp_path / "training.safetensors")
    assert state.keys() == unbroken[1].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in unbroken[1].items())
    assert any(name.endswith("e_score_correction_bias") for name in state)


@pytest.mark.full
@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    unbroken: tuple[list[float], State], tmp_path: Path
) -> None:
    full = launch(tmp_path, "full")  # no file may grow beyond 60 kB; the optimizer's state is larger
    assert full.returncode == 1
    assert "OutOfBudget" in full.stderr.splitlines()[-2]
    assert "continues from its last complete checkpoint" in full.stderr.splitlines()[-1]
    assert checkpoints(tmp_path) == []
    assert run(tmp_path).losses == unbroken[0]


def test_a_second_process_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    with lock(tmp_path / "run"), pytest.raises(BadConfig, match="is writing this folder"):
        train(build("olmoe"), None, text(), settings(), output=tmp_path / "run")


def test_marks_list_every_file(tmp_path: Path) -> None:
    made = trainer(build("olmoe"), Rows(8), tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    made.add_callback(CompleteCheckpoints())
    made.train()
    assert [step for step, path in checkpoints(tmp_path) if is_complete(path)] == [1, 2, 3]
    newest = tmp_path / "checkpoint-3"
    listed = json.loads((newest / MARK).read_text())["files"]
    assert set(listed) == {path.name for path in newest.iterdir()} - {MARK}
    (newest / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-2" / MARK).write_text("{")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert remove_incomplete(tmp_path) == [tmp_path / "checkpoint-2", newest]
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.full
@pytest.mark.slow
def test_a_run_that_starts_over_unmarks_what_it_will_overwrite(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    for _ in range(2):
        made = trainer(build("olmoe"), Rows(8), tmp_path, **settings)
        made.add_callback(CompleteCheckpoints())
        made.train()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    made = trainer(build("olmoe"), Rows(8), tmp_path, **settings | {"max_steps": 1, "save_strategy": "no"})
    made.add_callback(CompleteCheckpoints())
    made.train()
    assert last_complete_checkpoint(tmp_path) is None


class Exact(ExactResume, Trainer):
    """Any Trainer with the mixin."""


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_mixin_restores_stacked_experts_in_any_trainer(family: str, tmp_path: Path) -> None:
    def once(folder: Path, resume: Path | None) -> tuple[list[float], torch.nn.Module]:
        made = trainer(build(family), Rows(8), folder, save_strategy="steps", save_steps=2, max_steps=4)
        made.__class__ = Exact
        made.add_callback(MoECallback())
        made.add_callback(CompleteCheckpoints())
        made.train(resume_from_checkpoint=None if resume is None else str(resume))
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry], made.model

    whole, model = once(tmp_path, None)
    resumed, again = once(tmp_path, tmp_path / "checkpoint-2")
    assert resumed == whole
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.full
@pytest.mark.slow
def test_no_checkpoint_holds_nan(tmp_path: Path) -> None:
    model = build("olmoe")
    # The loss stays finite, its gradient does not.
    model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NumericFault, match="grad_norm"):
        train(model, None, text(), settings(save_every=1), output=tmp_path)
    assert checkpoints(tmp_path) == []


def test_save_model_still_writes_a_model(tmp_path: Path) -> None:
    made = trainer(build("olmoe"), Rows(8), tmp_path)
    made.__class__ = Exact
    made.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "config.json").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_what_changes_is_what_is_saved(tmp_path: Path) -> None:
    model = build("ernie4_5_moe")
    train_only(model, ["router"])
    save_changing(model, tmp_path)
    names = set(load_file(tmp_path / "training.safetensors"))
    assert names == {
        name
        for layer in find_moe_layers(model)
        for name in (f"{layer.router_name}.weight", f"{layer.router_name}.moe_statics.e_score_correction_bias")
    }
    train_only(model, ["router", "norms"])
    with pytest.raises(BadCheckpoint, match="norm"):
        load_changing(model, tmp_path)
