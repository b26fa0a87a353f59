"""Options that would change nothing are refused, and no work is done twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moekit
from moekit.errors import BadConfig
from moekit.jobs import generate
from moekit.jobs.options.base import JobOptions
from moekit.jobs.options.evaluate import EvaluateOptions
from moekit.jobs.options.generate import GenerateOptions
from moekit.jobs.options.prune import PruneOptions
from moekit.jobs.options.quantize import QuantizeOptions
from moekit.jobs.options.slim import SlimOptions
from moekit.jobs.options.sparsify import SparsifyOptions
from moekit.jobs.options.train import TrainOptions
from moekit.placement import comparison, simulation
from tests.tiny import write_model, write_text

PRUNE: dict[str, Any] = {"model": "moe", "method": "random", "keep": 0.5, "proof": False}
NARROW: dict[str, Any] = {
    "model": "moe",
    "method": "random",
    "width": 0.5,
    "settings": {"repair": "none"},
    "proof": False,
}
ZERO: dict[str, Any] = {"model": "moe", "method": "magnitude", "sparsity": 0.5, "proof": False}
RANKED: list[JobOptions] = [
    EvaluateOptions(model="moe", data="text"),
    GenerateOptions(model="moe"),
    TrainOptions(model="moe", data="text"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_text(folder / "text", documents=2)
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SparsifyOptions(from_plan="p.json", max_tokens=5), "max_tokens"),
        (SparsifyOptions(from_plan="p.json", seq_len=5), "seq_len"),
        (SparsifyOptions(from_plan="p.json", batch_size=5), "batch_size"),
        (SparsifyOptions(**ZERO, seq_len=5), "seq_len"),
        (QuantizeOptions(from_plan="p.json", bits=3), "bits"),
        (QuantizeOptions(model="moe", method="rtn", bits=3, proof=False, batch_size=5), "batch_size"),
        (SlimOptions(from_plan="p.json", width=0.5), "width"),
        (SlimOptions(**NARROW, seq_len=5), "seq_len"),
        (PruneOptions(**PRUNE, max_tokens=5), "max_tokens"),
        (PruneOptions(**PRUNE, trace="trace", batch_size=5), "batch_size"),
        (PruneOptions(**PRUNE, data="text", demonstrations=5), "demonstrations"),
    ],
)
def test_options_of_a_text_that_is_not_read(options: JobOptions, words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        options.check()


@pytest.mark.parametrize("options", [SparsifyOptions(**ZERO), PruneOptions(**PRUNE), *RANKED])
def test_without_them_nothing_is_refused(options: JobOptions) -> None:
    options.check()


@pytest.mark.parametrize("options", RANKED)
def test_options_of_ranks_without_ranks(options: JobOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    for alone in ({"nodes": 2}, {"dispatch": "all-reduce"}, {"codec": "int8"}, {"placement": "p.json"}):
        with pytest.raises(BadConfig, match=next(iter(alone))):
            options.model_copy(update=alone).check()
    monkeypatch.setenv("WORLD_SIZE", "4")
    if isinstance(options, TrainOptions):
        options.check()  # each rank trains on its share of the rows
    else:
        with pytest.raises(BadConfig, match="4 ranks"):
            options.check()
    options.model_copy(update={"ep": 2, "nodes": 2, "dispatch": "all-reduce"}).check()


def test_each_of_two_models_is_opened_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    stock = generate.open_model

    def count(reference: str, **how: Any) -> Any:
        opened.append(reference)
        return stock(reference, **how)

    monkeypatch.setattr(generate, "open_model", count)
    told = moekit.generate(made / "moe", other=made / "moe", prompt="a river", max_new_tokens=2)
    assert told.agreement == 1.0
    assert len(opened) == 2


def test_placements_that_are_compared_are_solved_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moekit.profile(made / "moe", data=made / "text", out=tmp_path / "trace", seq_len=32, max_tokens=300)
    plain = moekit.place(tmp_path / "trace", method="swap")
    solved: list[str] = []
    for module in (comparison, simulation):
        stock = module.place

        def count(*args: Any, stock: Any = stock, **how: Any) -> Any:
            solved.append(how["solver"])
            return stock(*args, **how)

        monkeypatch.setattr(module, "place", count)
    told = moekit.place(tmp_path / "trace", method="swap", bandwidth="900GB/s")
    assert sorted(solved) == ["contiguous", *["random"] * 5, "swap"]
    assert told.devices[0]["rows"] == plain.devices[0]["rows"]
    assert [row["placement"] for row in told.devices[0]["predictions"]] == ["contiguous", "random", "swap"]
