"""What jobs say they need, against what they take."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moekit
from moekit.errors import BadConfig
from moekit.jobs import apply, expert_sets, quantize, slim, sparsify, super_experts
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, JobEstimate
from moekit.jobs.options.apply import ApplyOptions
from moekit.jobs.options.base import JobOptions
from moekit.jobs.options.expert_sets import ExpertSetsOptions
from moekit.jobs.options.prune import PruneOptions
from moekit.jobs.options.quantize import QuantizeOptions
from moekit.jobs.options.slim import SlimOptions
from moekit.jobs.options.sparsify import SparsifyOptions
from moekit.jobs.options.super_experts import SuperExpertsOptions
from moekit.jobs.options.train import TrainOptions
from moekit.jobs.shared.opened import open_source
from moekit.jobs.weights import fewer_job
from moekit.jobs.weights.sizes import layer_bytes, memory_of
from moekit.streaming.states import States
from tests.families import build
from tests.quantizing import fp8_packer, fp8_settings, requantized
from tests.tiny import tokenizer, write_text

FEW = {"max_tokens": 300, "proof_tokens": 100}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model stored in 16 bits, a text of two domains, and a plan of each kind."""
    folder = tmp_path_factory.mktemp("made")
    build("qwen3_moe").to(torch.bfloat16).save_pretrained(folder / "moe")
    tokenizer().save_pretrained(folder / "moe")
    write_text(folder / "text", documents=20)
    how: dict[str, Any] = {"data": folder / "text", "max_tokens": 300, "proof": False}
    moekit.prune(folder / "moe", method="frequency", keep=0.5, plan=folder / "p.json", **how)
    return folder


def told(options: JobOptions) -> JobEstimate:
    return options.estimate(Path("out"), ByteSizes())


def pruning(made: Path, **more: Any) -> PruneOptions:
    asked = {"model": made / "moe", "method": "frequency", "keep": 0.5, "data": made / "text", **FEW}
    return PruneOptions(**{**asked, **more})


def zeroing(made: Path, **more: Any) -> SparsifyOptions:
    asked = {"model": made / "moe", "method": "wanda", "sparsity": 0.5, "data": made / "text", **FEW}
    return SparsifyOptions(**{**asked, **more})


def rounding(made: Path, **more: Any) -> QuantizeOptions:
    asked = {"model": made / "moe", "method": "gptq", "bits": 3, "settings": {"group": 8}, "data": made / "text", **FEW}
    return QuantizeOptions(**{**asked, **more})


def narrowing(made: Path, **more: Any) -> SlimOptions:
    return SlimOptions(**{"model": made / "moe", "width": "1/2", "data": made / "text", **FEW, **more})


def looking(made: Path, **more: Any) -> SuperExpertsOptions:
    return SuperExpertsOptions(**{"model": made / "moe", "data": made / "text", **FEW, **more})


def tasks(made: Path, **more: Any) -> ExpertSetsOptions:
    return ExpertSetsOptions(**{"model": made / "moe", "data": made / "text", "max_tokens": 150, **more})


def applying(made: Path, **more: Any) -> ApplyOptions:
    return ApplyOptions(**{"plan": made / "p.json", "proof_tokens": 100, **more})


class Stopped(Exception):
    """The work itself is not wanted."""


@pytest.mark.parametrize("wide", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (fewer_job, pruning),
        (fewer_job, lambda made, **more: pruning(made, write="plan", **more)),
        (fewer_job, lambda made, **more: pruning(made, method="dern", **more)),
        (sparsify, zeroing),
        (sparsify, lambda made, **more: zeroing(made, write="plan", **more)),
        (quantize, rounding),
        (quantize, lambda made, **more: rounding(made, write="plan", **more)),
        (slim, narrowing),
        (slim, lambda made, **more: narrowing(made, write="plan", **more)),
        (apply, applying),
        (super_experts, looking),
        (expert_sets, tasks),
    ],
)
def test_a_dry_run_tells_what_the_run_makes_sure_of(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    options: Callable[..., JobOptions],
    wide: str,
) -> None:
    asked = options(made, dtype=wide)
    needs: list[int] = []

    def check_disk(out: Path, scratch: Path, output: int, between: int) -> None:
        needs.append(output + between)
        raise Stopped

    monkeypatch.setattr(module, "check_disk", check_disk)
    with pytest.raises(Stopped):
        asked.run(JobContext(out=tmp_path / "out", scratch=tmp_path / "scratch"))
    known = told(asked)
    assert known.disk == needs[0]


@pytest.mark.parametrize("wide", ["float32", "bfloat16"])
def test_states_and_rewritten_layers_fit_into_what_is_foreseen(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: str
) -> None:
    sizes: list[int] = []
    stock = States.__init__

    def count(self: States, *args: Any, **more: Any) -> None:
        stock(self, *args, **more)
        sizes.append(self.nbytes)

    monkeypatch.setattr(States, "__init__", count)
    asked = pruning(made, method="dern", dtype=wide)
    rewritten: list[int] = []

    def finish(*args: Any) -> dict[str, Any]:
        found = stock_finish(*args)
        files = (tmp_path / "scratch" / "rewritten").glob("*.safetensors")
        rewritten.append(sum(file.stat().st_size for file in files))
        return found

    stock_finish = fewer_job.finish
    monkeypatch.setattr(fewer_job, "finish", finish)
    asked.run(JobContext(out=tmp_path / "out", scratch=tmp_path / "scratch"))
    known = told(asked)
    assert known.disk is not None
    assert rewritten[0] > 0
    written = known.writes[0].nbytes or 0
    # Headers of the files are not foreseen.
    assert sum(sizes) + rewritten[0] <= (known.disk - written) + 4_000


def test_layers_that_a_text_made_lie_there_once_whatever_the_proof_runs_in(made: Path) -> None:
    between = {}
    for wide in ("float32", "bfloat16"):
        known = told(rounding(made, dtype=wide))
        assert known.disk is not None
        between[wide] = known.disk - (known.writes[0].nbytes or 0)
    # States are twice as wide in float32, layers lie as they are stored: 2 (states + layers) - (2 states + layers).
    layers = sum(layer_bytes(open_source(str(made / "moe"))).values())
    assert 2 * between["bfloat16"] - between["float32"] == layers


def test_only_layers_are_counted_that_a_plan_rewrites(made: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"data": made / "text", "max_tokens": 300, "proof": False}
    moekit.prune(made / "moe", method="dern", keep=0.5, plan=tmp_path / "p.json", **how)
    known = told(applying(made, plan=tmp_path / "p.json", dtype="bfloat16", proof=False))
    half = sum(layer_bytes(open_source(str(made / "moe"))).values()) // 2
    assert known.disk == (known.writes[0].nbytes or 0) + half


def test_a_plan_alone_of_what_cannot_be_is_refused_as_a_model_is(made: Path) -> None:
    for write in ("model", "plan"):
        with pytest.raises(BadConfig):
            told(pruning(made, keep=400, write=write))


def test_all_that_run_layers_need_the_same_memory(made: Path) -> None:
    for wide in ("float32", "bfloat16"):
        asked: list[JobOptions] = [f(made, dtype=wide) for f in (pruning, zeroing, applying, looking, tasks)]
        found = {told(options).memory for options in asked}
        assert len(found) == 1
        (memory,) = found
        assert memory is not None
        assert memory > 1 << 30
    assert told(pruning(made, dtype="float32")).memory > told(pruning(made, dtype="bfloat16")).memory  # type: ignore[operator]


def test_layers_of_quantized_weights_need_the_memory_of_floats(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "moe", tmp_path / "fp8")
    floats = requantized(tmp_path / "fp8", fp8_settings((16, 16)), fp8_packer((16, 16)))
    needs = [
        memory_of(open_source(str(folder)), PruneOptions(model=str(folder), method="random", keep=2, dtype="float32"))
        for folder in (tmp_path / "fp8", floats)
    ]
    assert needs[0] == needs[1]


def test_a_teacher_takes_memory_and_is_read(made: Path) -> None:
    how: dict[str, Any] = {"model": made / "moe", "data": made / "text"}
    alone, taught = told(TrainOptions(**how)), told(TrainOptions(**how, teacher=made / "moe"))
    size = alone.reads[0].nbytes
    assert size is not None
    assert alone.memory is not None
    assert taught.memory is not None
    assert taught.memory >= alone.memory + size
    assert [item.what for item in taught.reads].count(str(made / "moe")) == 2


def test_each_domain_is_a_task_of_its_own(made: Path) -> None:
    one, two = told(tasks(made, task="all")), told(tasks(made))
    assert one.disk is not None
    assert two.disk is not None
    kept = 1 << 20
    assert two.disk - kept == 2 * (one.disk - kept)
    # How many tasks a data set on a hub has is not known before it is here.
    assert told(tasks(made, data="no/such-text")).disk is None


def test_a_text_too_small_to_be_parted_is_decided_on_where_nothing_is_proved(made: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("abcdefgh ")
    done = moekit.prune(
        made / "moe", method="frequency", keep=0.5, data=tmp_path / "tiny.txt", proof=False, plan=tmp_path / "p.json"
    )
    assert done.tokens > 0
