"""Ranks meet, agree and part; or stop before they begin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moekit.errors import BadConfig
from moekit.parallel import agree, start_ranks
from moekit.parallel.launch.start import current
from tests.parallel.launching import by_hand, torchrun

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_launcher_nothing_is_started(alone: pytest.MonkeyPatch) -> None:
    with start_ranks() as ranks:
        assert (ranks.rank, ranks.world, ranks.heartbeat) == (0, 1, None)
        assert not dist.is_initialized()
        assert current() is ranks
        agree(config={"top_k": 2})
        with pytest.raises(BadConfig, match="already"):
            start_ranks()
    assert current() is None


def test_errors_of_a_single_rank_pass_through(alone: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="gloo"), start_ranks():
        raise RuntimeError("gloo something")
    assert current() is None


def test_a_single_rank_can_have_a_group(alone: pytest.MonkeyPatch) -> None:
    with start_ranks(group_of_one=True):
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1]
    assert not dist.is_initialized()


def test_half_a_launch_is_refused(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("RANK", "1")
    alone.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadConfig, match="MASTER_ADDR, MASTER_PORT is not set"):
        start_ranks()


def test_ranks_meet_work_and_part(tmp_path: Path) -> None:
    with by_hand(tmp_path, "none", 0, "", world=4) as job:
        assert job.wait() == [0, 0, 0, 0]
        assert job.words() == {rank: [] for rank in range(4)}


def test_ranks_of_torchrun_meet_work_and_part(tmp_path: Path) -> None:
    with torchrun(tmp_path, "none", 0, "") as job:
        assert job.wait() == [0]
        assert job.words() == {rank: [] for rank in range(3)}


@pytest.mark.parametrize(
    ("fault", "victim", "said"),
    [
        ("config", 1, "ranks disagree about config.top_k: rank 1 has 4; ranks 0, 2 have 2"),
        ("plan", 0, "ranks disagree about plan: rank 0 has ab12; ranks 1, 2 have cd34"),
    ],
)
def test_ranks_that_disagree_all_stop_and_name_the_odd_one(tmp_path: Path, fault: str, victim: int, said: str) -> None:
    with by_hand(tmp_path, fault, victim, "") as job:
        assert job.wait() == [2, 2, 2]
        assert all(said in job.last_words(rank) for rank in range(3)), job.words()


@pytest.mark.slow  # the quick run has ranks that disagree without a launcher
def test_under_torchrun_ranks_that_disagree_end_as_they_say(tmp_path: Path) -> None:
    with torchrun(tmp_path, "plan", 2, "") as job:
        assert job.wait() == [1]
        assert (tmp_path / "launcher.log").read_text().count("exitcode  : 2 ") == 3
        assert all("ranks disagree about plan: rank 2 has ab12" in job.last_words(rank) for rank in range(3))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("odd", [0, 2])
def test_another_world_size_is_named(tmp_path: Path, odd: int) -> None:
    with by_hand(tmp_path, "none", 0, "", each={odd: {"WORLD_SIZE": "4"}}) as job:
        assert job.wait() == [2, 2, 2]
        assert all(f"WORLD_SIZE: rank {odd} has 4" in job.last_words(rank) for rank in range(3)), job.words()


@pytest.mark.full
@pytest.mark.slow
def test_two_processes_with_one_number_are_told_apart(tmp_path: Path) -> None:
    with by_hand(tmp_path, "none", 0, "", each={2: {"RANK": "1"}}, MOEKIT_RANK_TIMEOUT="5") as job:
        codes = job.wait()
        assert codes[0] == 5
        assert "rank 2 did not start within 5 s" in job.last_words(0)
        assert sorted(code or 0 for code in codes[1:]) == [2, 5]
        assert any("two processes were started as rank 1" in job.last_words(rank) for rank in (1, 2))


@pytest.mark.full
@pytest.mark.slow
def test_a_rank_that_never_starts_is_named(tmp_path: Path) -> None:
    with by_hand(tmp_path, "never", 2, "", MOEKIT_RANK_TIMEOUT="5") as job:
        assert job.wait() == [5, 5, 7]
        assert all("rank 2 did not start within 5 s" in job.last_words(rank) for rank in (0, 1))


@pytest.mark.full
@pytest.mark.slow
def test_a_rank_that_says_nothing_is_named(tmp_path: Path) -> None:
    with by_hand(tmp_path, "mute", 1, "") as job:
        assert job.wait() == [5, 5, 5]
        for rank in (0, 2):
            assert "rank 1 (pid" in job.last_words(rank)
            assert "did not say within 4 s what it is about to do" in job.last_words(rank)
