"""`moekit place` with links and copies: what it writes, what it tells, what it refuses."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.cli.main import main
from moekit.errors import BadConfig
from moekit.jobs.context import JobContext
from moekit.jobs.options.place import PlaceOptions
from moekit.placement import Placement, Topology, predict_sending
from moekit.placement.topology import parse_latency
from moekit.report.results import load_replay
from moekit.trace import Trace
from tests.unit.placement.samples import trace_of


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place") / "trace"
    g = torch.Generator().manual_seed(0)
    # The first experts are hot.
    weight_E = 1 / torch.arange(1, 17)
    chosen = {layer: torch.multinomial(weight_E.expand(600, 16), 4, generator=g) for layer in (0, 2)}
    trace_of(chosen, 16, documents=24).save(folder)
    return folder


@pytest.fixture
def moekit(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    before = signal.getsignal(signal.SIGTERM)

    def call(*args: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main([str(arg) for arg in args])
        told = capsys.readouterr()
        assert left.value.code == code, told.err
        return told.out if code == 0 else told.err

    yield call
    signal.signal(signal.SIGTERM, before)


def run(trace: Path, out: Path, **options: Any) -> dict[str, Any]:
    step = PlaceOptions(trace=str(trace), method="swap", **options)
    step.check()
    return step.run(JobContext(out=out, scratch=out.parent / "scratch"))


def test_without_bandwidth_nothing_is_predicted(trace: Path, tmp_path: Path) -> None:
    (part,) = run(trace, tmp_path / "out", devices=(4,))["devices"]
    assert part["links"] is None
    assert part["predictions"] == []
    assert [row["name"] for row in part["rows"]] == ["contiguous", "random", "swap"]
    assert not Placement.load(tmp_path / "out" / "placement-4.json").replicas


def test_predictions_are_those_of_the_library(trace: Path, tmp_path: Path) -> None:
    links = {"nodes": 2, "bandwidth": "900GB/s,50GB/s", "latency": "3us,10us", "dtype": "float32"}
    (part,) = run(trace, tmp_path / "out", devices=(4,), compare=("contiguous",), **links)["devices"]
    assert [found["placement"] for found in part["predictions"]] == ["contiguous", "swap"]
    topology = Topology.make(4, 2, "900GB/s,50GB/s", latency=parse_latency("3us,10us"))
    assert Topology(**{k: v for k, v in part["links"].items() if k != "dtype"}) == topology
    placed = Placement.load(tmp_path / "out" / "placement-4.json")
    again = predict_sending(Trace.load(trace), placed, topology, itemsize=4).as_dict()
    assert part["predictions"][-1] == {"placement": "swap", **again}
    wide, narrow = again["sending"]["once per expert"], again["sending"]["once per device"]
    assert narrow["links"]["inter"]["rows"] < wide["links"]["inter"]["rows"]


@pytest.mark.parametrize(("copies", "name"), [("added", "swap+2"), ("eplb", "eplb+2")])
def test_copies_are_written_last(trace: Path, tmp_path: Path, copies: str, name: str) -> None:
    options = {"nodes": 2, "bandwidth": "1GB/s", "redundant": 2, "copies": copies}
    (part,) = run(trace, tmp_path / "out", devices=(4,), **options)["devices"]
    names = {row["name"]: row for row in part["rows"]}
    assert set(names) == {"contiguous", "random", "swap", "swap+2", "eplb+2"}
    assert part["rows"][-1]["name"] == part["predictions"][-1]["placement"] == name
    assert load_replay(tmp_path / "out")["devices"][0]["rows"][-1]["name"] == name
    placed = Placement.load(tmp_path / "out" / "placement-4.json")
    assert placed.hash == part["placement"]
    for layer in (0, 2):
        assert [sum(d in held for held in placed.holders(layer)) for d in range(4)] == [6] * 4
    # Copies never cost rows: a token takes one where it goes anyway.
    for rows in ("rows_per_token", "remote_per_token"):
        assert names[name][rows] < min(names[plain][rows] for plain in ("contiguous", "swap"))


def test_as_on_the_command_line(
    trace: Path, tmp_path: Path, moekit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is folded on a terminal of the usual width."""
    monkeypatch.setenv("COLUMNS", "84")
    links = ("--nodes", 2, "--bandwidth", "900GB/s,50GB/s", "--latency", "3us,10us", "--redundant-experts", 1)
    told = moekit("place", "swap", trace, "-o", tmp_path / "out", "--ranks", "4,8", *links)
    assert "8 devices in 2 nodes" in told
    for word in ("hierarchical", "swap+1 ", "eplb+1 ", "time in", "out, in", "1 expert slot more"):
        assert word in told
    answer = json.loads(moekit("place", "swap", trace, "-o", tmp_path / "again", "--devices", "8", *links, "--json"))
    (part,) = answer["devices"]
    assert part["links"]["inter"] == 50e9
    assert set(part["predictions"][0]["sending"]) == {"once per expert", "once per device", "hierarchical"}
    assert sum(part["predictions"][0]["load"]) == 600 * 4 * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bandwidth": "fast"}, "no bandwidth"),
        ({"latency": "3us"}, "a latency alone"),
        ({"bandwidth": "1GB/s", "latency": "3"}, "no latency"),
        ({"bandwidth": "1GB/s", "nodes": 5}, "5 nodes"),
    ],
)
def test_refused_before_anything_runs(trace: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        PlaceOptions(trace=str(trace), method="swap", devices=(4,), **options).check()


def test_more_spare_than_there_is_to_copy(trace: Path, tmp_path: Path, moekit: Callable[..., str]) -> None:
    told = moekit("place", "swap", trace, "-o", tmp_path / "out", "--devices", 4, "--redundant", 13, code=2)
    assert "0 to 12 redundant slots" in told
    assert not (tmp_path / "out").exists()
