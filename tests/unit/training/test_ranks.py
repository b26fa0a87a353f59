"""Two processes with one micro-batch each train as one process that accumulates both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[3]

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
callback = MoECallback(balance_coef=0.5, z_coef=0.01, bias_rate=0.01)
run = trainer(build("deepseek_v3"), Rows(12), folder, gradient_accumulation_steps=accumulate, max_steps=3,
              learning_rate=0.1)
run.add_callback(callback)
run.train()
if run.is_world_process_zero():
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in run.model.state_dict().items()}, folder / "weights.safetensors")
    (folder / "figures.json").write_text(callback.figures.model_dump_json())
"""


def _launch(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_equal_one_process_that_accumulates(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    _launch([sys.executable, str(script), str(tmp_path / "one"), "2"], tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _launch([*torchrun, str(script), str(tmp_path / "two"), "1"], tmp_path)
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    # Counts are sums over ranks, hence equal; gradients are summed in another order.
    figures = [json.loads((tmp_path / name / "figures.json").read_text())["layers"] for name in ("one", "two")]
    assert [layer["load"] for layer in figures[0].values()] == [layer["load"] for layer in figures[1].values()]
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    biases = [name for name in one if name.endswith("e_score_correction_bias")]
    assert biases
    assert all(torch.equal(one[name], two[name]) for name in biases)
