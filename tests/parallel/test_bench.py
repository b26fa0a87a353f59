"""The bench with real ranks: tiny layers, over namespaces where they can be made and over the loopback anyway."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moekit.bench.dispatch import network
from moekit.bench.dispatch.checks import replays
from moekit.bench.dispatch.competitors.base import all_entries
from moekit.bench.dispatch.harness import run_bench, start
from moekit.bench.dispatch.result import BenchResult
from moekit.bench.dispatch.setting import BASELINE, DispatchBenchSetting, Entry, Job
from moekit.bench.dispatch.workload import Workload, make_layer
from moekit.cli.main import main
from moekit.errors import PeerLost

REASON = network.why_not()
SMALL = DispatchBenchSetting(tokens=48, hidden=32, experts=8, width=24, top_k=3)
# Neither contiguous nor equal.
PLACED = {0: [3, 0, 2, 1, 0, 2, 0, 1]}
ONCE = Entry(peer="ours", variant="once-per-rank")


@pytest.fixture(scope="module")
def work() -> Workload:
    return make_layer(SMALL)


@pytest.fixture(scope="module")
def result(work: Workload) -> BenchResult:
    entries = [*all_entries(["placed"]), Entry(peer="ours", variant="once-per-rank int8")]
    rates = (1e8, None)
    return run_bench(work, entries=entries, layouts={"placed": PLACED}, rates=rates, rounds=2)


@pytest.fixture(scope="module")
def short(work: Workload) -> BenchResult:
    """The four ways that the quick tests compare."""
    ours = [Entry(peer="ours", variant=v) for v in ("hierarchical", "once-per-rank", "once-per-rank int8")]
    return run_bench(work, entries=[BASELINE, *ours], rates=(1e8,), rounds=2)


def processes() -> list[str]:
    listed = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "bench.workers" in line and line.split()[0] == str(os.getpid())]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert processes() == []
    if REASON is None:
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert f"{network.PREFIX}-{os.getpid()}-" not in listed


@pytest.mark.full
@pytest.mark.slow
def test_all_that_can_take_part_are_exact(result: BenchResult) -> None:
    taking = [entry for entry in result.entries if not entry.skipped]
    assert len(taking) >= 10
    for entry in taking:
        assert entry.exactness is not None
        if entry.name == "DeepSpeed cf=1":
            assert 0 < entry.exactness.share < 1
        elif "int8" in entry.name:
            assert entry.exactness.error < 0.05 * entry.exactness.largest
        else:
            assert entry.exactness.share == 1, entry.name
            assert entry.exactness.worst_gradient < 1e-5, entry.name


@pytest.mark.full
@pytest.mark.slow
def test_only_what_is_not_installed_is_skipped(result: BenchResult) -> None:
    for entry in result.entries:
        assert not entry.skipped or entry.skipped.startswith("not installed"), entry.name


@pytest.mark.full
@pytest.mark.slow
def test_rows_are_those_of_the_replay(result: BenchResult) -> None:
    checked = [entry for entry in result.entries if entry.rows is not None]
    assert {entry.entry.variant for entry in checked} >= {"once-per-expert", "once-per-rank", "hierarchical"}
    assert {entry.entry.placement for entry in checked} == {"", "placed"}
    for entry in checked:
        assert entry.rows is not None
        assert entry.rows.alike, entry.name
        assert entry.rows.counted == entry.rows.replayed


@pytest.mark.full
@pytest.mark.slow
def test_own_counters_say_what_the_collectives_were_given(result: BenchResult) -> None:
    for entry in result.entries:
        # What a gather or a reduction sends is up to the back-end; an exchange says it row by row.
        if entry.entry.peer == "ours" and not entry.shared_batch and entry.entry.variant != "all-gather":
            for part in (entry.forward, entry.total):
                assert part is not None
                assert part.own == part.counted, entry.name


def test_bytes_of_transformers_are_rows_and_counts(short: BenchResult, work: Workload) -> None:
    (replayed,) = replays(work, Job(setting=SMALL, layers=(0,), entries=(BASELINE,)), BASELINE)
    assert replayed.across_per_expert is not None
    base = short.baseline
    assert base is not None
    assert base.forward is not None
    assert base.forward.counted is not None
    # Rows there and back, and 2 experts' int64 counts from each rank to the two of the other node.
    assert sum(base.forward.counted) == 2 * replayed.across_per_expert * 32 * 4 + 4 * 2 * 2 * 8


def test_fewer_bytes_leave_the_nodes_where_a_token_travels_once(short: BenchResult) -> None:
    def sent(name: str) -> int:
        total = short.find(name).total
        assert total is not None
        assert total.counted is not None
        return sum(total.counted)

    assert sent("moekit hierarchical") < sent("moekit once-per-rank") < sent("transformers all_to_all")
    assert sent("moekit once-per-rank int8") < sent("moekit once-per-rank")


@pytest.mark.skipif(REASON is not None, reason=f"no network namespaces here: {REASON}")
def test_devices_count_what_the_collectives_were_given_and_headers(short: BenchResult) -> None:
    assert short.shaped
    for name in ("transformers all_to_all", "moekit once-per-rank", "moekit hierarchical"):
        total = short.find(name).total
        assert total is not None
        assert total.sent is not None
        assert total.counted is not None
        for sent, counted in zip(total.sent, total.counted, strict=True):
            # Packets of tiny tensors are half headers; barriers are in it, too.
            assert counted < sent < 1.3 * counted + 6000, name


def test_every_round_is_there(short: BenchResult) -> None:
    for entry in short.entries:
        for rate in () if entry.skipped else short.rates:
            timing = entry.at(rate)
            assert timing is not None
            assert len(timing.total) == 2
            assert all(0 < f < t for f, t in zip(timing.forward, timing.total, strict=True))
            assert (timing.total_ratio is None) == (entry.entry == BASELINE)


def _lose_a_rank() -> None:
    with start(make_layer(SMALL.model_copy(update={"ranks": 2})), [BASELINE, ONCE], {}, False) as bench:
        profile = bench.team.ask("profile", number=1, rounds=2)[0]
        assert {"plan", "experts, forward", "experts, backward", "waiting for counts"} <= set(profile["phases"])
        assert sum(profile["phases"].values()) == pytest.approx(profile["total"])
        assert profile["operations"]
        bench.team.processes[1].kill()
        bench.team.ask("time", seconds=30, turns=[[0, 1]], seed=0)


@pytest.mark.full
@pytest.mark.slow
def test_where_time_goes_is_told_and_a_dead_rank_ends_the_bench() -> None:
    with pytest.raises(PeerLost, match="rank 1 of the bench was ended by signal 9"):
        _lose_a_rank()


@pytest.mark.full
@pytest.mark.slow
def test_the_command_writes_a_page_over_a_modelled_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        "--tokens",
        "32",
        "--hidden",
        "32",
        "--experts",
        "8",
        "--width",
        "16",
        "--top-k",
        "2",
        "--rounds",
        "2",
        "--ranks",
        "2",
    ]
    options = ["--rate", "200Mbit/s,none", "--no-shaped", "--json"]
    with pytest.raises(SystemExit) as left:
        main(["bench", "ep", "--out", str(tmp_path / "b"), *sizes, "--only", "once-per-rank,hierarchical", *options])
    assert left.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    found = BenchResult.read(tmp_path / "b")
    assert [entry.name for entry in found.entries] == [
        "transformers all_to_all",
        "moekit hierarchical",
        "moekit once-per-rank",
    ]
    assert not found.shaped
    assert "modelled" in found.notes[0]
    slow, fast = found.find("moekit once-per-rank").timings
    assert slow.modelled
    assert not fast.modelled
    assert answer["rounds"] == 2
    page = (tmp_path / "b" / "report.html").read_text()
    assert "moekit once-per-rank" in page
    assert "The link is modelled" in page
    with pytest.raises(SystemExit) as left:
        main(["bench", "ep", "--out", str(tmp_path / "b"), *sizes, "--only", "no-such-way", "--overwrite"])
    assert left.value.code == 2
    assert "no-such-way takes no part" in capsys.readouterr().err
