"""Two processes with one micro-batch each train as one process that accumulates both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import ranks

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from moekit.training import MoECallback
from tests.families import build
from tests.unit.training.helpers import Rows, trainer

folder, accumulate = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
callback = MoECallback({"balance": 0.5, "z": 0.01}, balancer={"use": "sign", "rate": 0.01})
run = trainer(build("deepseek_v3"), Rows(12), folder, gradient_accumulation_steps=accumulate, max_steps=3,
              learning_rate=0.1)
run.add_callback(callback)
run.train()
if run.is_world_process_zero():
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in run.model.state_dict().items()}, folder / "weights.safetensors")
    (folder / "figures.json").write_text(callback.figures.model_dump_json())
"""

TRAIN = """
import sys
from pathlib import Path
import torch
from moekit.training import TrainConfig, train
from tests.families import build
from tests.unit.training.test_run import text

torch.set_num_threads(1)
config = TrainConfig(steps=6, batch=2, accumulation=int(sys.argv[2]), seq_len=16, lr=1e-2, objectives={"balance": 0.02},
                     balancer={"use": "sign", "rate": 0.01}, save_every=2, seed=4, precision="fp32")
calls = []
class Bar:
    def start(self, label, total): pass
    def finish(self): pass
    def advance(self, amount=1, note=""):
        calls.append(note)
        if sys.argv[3:] and len(calls) == 5: raise KeyboardInterrupt
result = train(build("deepseek_v3"), None, text(padded=True), config, output=Path(sys.argv[1]), progress=Bar(),
               heldout=text(4, seed=1))
"""


def _launch(world: int, *args: object, folder: Path, fails: bool = False) -> None:
    done = ranks(args, world, cwd=folder)
    assert any(rank.returncode for rank in done) == fails, [rank.stderr[-3000:] for rank in done]


def test_two_ranks_equal_one_process_that_accumulates(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    _launch(1, script, tmp_path / "one", 2, folder=tmp_path)
    _launch(2, script, tmp_path / "two", 1, folder=tmp_path)
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    # Counts are sums over ranks, hence equal; gradients are summed in another order.
    figures = [json.loads((tmp_path / name / "figures.json").read_text())["layers"] for name in ("one", "two")]
    assert [layer["load"] for layer in figures[0].values()] == [layer["load"] for layer in figures[1].values()]
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    biases = [name for name in one if name.endswith("e_score_correction_bias")]
    assert biases
    assert all(torch.equal(one[name], two[name]) for name in biases)


@pytest.mark.full
@pytest.mark.slow
def test_ranks_train_with_a_break(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(TRAIN)
    _launch(1, script, tmp_path / "one", 2, folder=tmp_path)
    _launch(2, script, tmp_path / "two", 1, "break", folder=tmp_path, fails=True)
    assert (tmp_path / "two" / "checkpoint-4" / "complete.json").exists()
    _launch(2, script, tmp_path / "two", 1, folder=tmp_path)
    one, two = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("one", "two"))
    assert (one["resumed_from"], two["resumed_from"]) == (None, 4)
    torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(two["losses"]), atol=1e-5, rtol=1e-5)
    assert one["tokens"] == two["tokens"]
    states = [load_file(tmp_path / name / "training.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(states[0], states[1], atol=2e-4, rtol=1e-3)
