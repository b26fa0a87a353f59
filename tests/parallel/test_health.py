"""A rank dies, stalls, fails or is stopped: every other rank ends within a bound, and its last line says who it was."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.contracts import FULL
from tests.parallel.launching import Job, alive, by_hand, torchrun

GONE, BAD_INPUT, INTERRUPTED = 5, 2, 130


def _check_survivors(job: Job, victim: int, world: int, *said: str) -> None:
    for rank in set(range(world)) - {victim}:
        last = job.last_words(rank)
        assert f"rank {victim} (pid {job.pids()[victim]} on host " in last, f"rank {rank}: {job.words()[rank]}"
        for text in said:
            assert text in last, f"rank {rank}: {last}"


@pytest.mark.parametrize("when", ["before", "middle", "after"])
def test_a_rank_killed_around_a_dispatch_is_named_by_all_others(tmp_path: Path, when: str) -> None:
    with by_hand(tmp_path, "kill", 2, when, world=4) as job:
        codes = job.wait()
        assert codes == [GONE, GONE, -signal.SIGKILL, GONE]
        _check_survivors(job, 2, 4, "is gone: no sign of life for")


def test_when_rank_0_is_killed_its_store_goes_with_it_and_both_are_named(tmp_path: Path) -> None:
    with by_hand(tmp_path, "kill", 0, "middle") as job:
        assert job.wait() == [-signal.SIGKILL, GONE, GONE]
        _check_survivors(job, 0, 3, "the store on 127.0.0.1:", "is gone", "died")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=FULL)])
def test_a_stopped_rank_is_named_although_no_connection_closes(tmp_path: Path, victim: int) -> None:
    with by_hand(tmp_path, "stop", victim, "before") as job:
        job.until_printed("dispatching", 3)
        started = time.monotonic()
        codes = job.wait(but=victim)
        assert time.monotonic() - started < 20  # silent for 4 s, not the 60 s of a collective
        assert [code for rank, code in enumerate(codes) if rank != victim] == [GONE, GONE]
        _check_survivors(job, victim, 3, "4" if victim else "does not answer for 4 s")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_raises_tells_the_others_why(tmp_path: Path, victim: int) -> None:
    with by_hand(tmp_path, "raise", victim, "middle") as job:
        codes = job.wait()
        assert codes == [BAD_INPUT if rank == victim else GONE for rank in range(3)]
        _check_survivors(job, victim, 3, "failed first: BadData: the text of this rank is empty")
        assert "the text of this rank is empty" in job.last_words(victim)


@pytest.mark.full
@pytest.mark.slow
def test_a_rank_stuck_in_user_code_is_named_by_the_exchanges_it_did_not_enter(tmp_path: Path) -> None:
    with by_hand(tmp_path, "spin", 1, "before", MOEKIT_RANK_TIMEOUT="6") as job:
        assert job.wait() == [GONE, GONE, GONE]
        _check_survivors(job, 1, 3, "lives but is behind: it has entered 15 exchanges")
        assert "(this one) was evicted" in job.last_words(1) or "the store" in job.last_words(1)


@pytest.mark.full
@pytest.mark.slow
def test_a_rank_that_ends_early_is_named_when_the_others_wait_for_it(tmp_path: Path) -> None:
    with by_hand(tmp_path, "exit", 1, "middle", MOEKIT_RANK_TIMEOUT="6") as job:
        assert job.wait() == [GONE, 0, GONE]
        _check_survivors(job, 1, 3, "had ended before")


@pytest.mark.full
@pytest.mark.slow
def test_a_rank_told_to_stop_on_its_own_is_named_as_that(tmp_path: Path) -> None:
    with by_hand(tmp_path, "term", 1, "before") as job:
        assert job.wait() == [GONE, INTERRUPTED, GONE]
        _check_survivors(job, 1, 3, "was stopped: by SIGTERM")


def test_sigterm_to_a_child_of_a_rank_concerns_nobody_else(tmp_path: Path) -> None:
    with by_hand(tmp_path, "child", 1, "before") as job:
        assert job.wait() == [0, 0, 0], job.words()
        assert job.words() == {0: [], 1: [], 2: []}


def test_under_torchrun_a_killed_rank_is_named_by_the_others_and_the_launcher_fails(tmp_path: Path) -> None:
    with torchrun(tmp_path, "kill", 1, "middle") as job:
        assert job.wait() == [1]
        _check_survivors(job, 1, 3, "is gone: no sign of life for")
        assert (tmp_path / "launcher.log").read_text().count("exitcode  : 5 ") == 2
        assert not any(map(alive, job.pids().values()))


@pytest.mark.full
@pytest.mark.slow
def test_a_script_that_handles_nothing_names_the_rank_too(tmp_path: Path) -> None:
    with torchrun(tmp_path, script="plain.py") as job:
        assert job.wait() == [1]
        assert (tmp_path / "launcher.log").read_text().count("exitcode  : 5 ") == 2
        for rank in (0, 2):
            assert "rank 1 (pid" in job.last_words(rank)
            assert "failed first: ValueError: a fault of the user's" in job.last_words(rank)


@pytest.mark.full
@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_and_blames_none(tmp_path: Path) -> None:
    with torchrun(tmp_path, "calm", 0, "") as job:
        job.until_printed("dispatching", 3)
        os.kill(_pid_of_launcher(job), signal.SIGTERM)
        assert job.wait() != [0]
        assert not any(map(alive, job.pids().values()))
        for rank in range(3):
            assert "interrupted" in job.last_words(rank) or "stopped by SIGTERM" in job.last_words(rank)


@pytest.mark.full
@pytest.mark.slow
def test_when_torchrun_is_killed_no_rank_stays(tmp_path: Path) -> None:
    with torchrun(tmp_path, "calm", 0, "") as job:
        job.until_printed("dispatching", 3)
        os.kill(_pid_of_launcher(job), signal.SIGKILL)
        job.wait()
        deadline = time.monotonic() + 120
        while any(map(alive, job.pids().values())):
            assert time.monotonic() < deadline, job.words()
            time.sleep(0.1)
        for rank in range(3):
            assert "the store on 127.0.0.1:" in job.last_words(rank)
            assert "the launcher" in job.last_words(rank)


def _pid_of_launcher(job: Job) -> int:
    parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in job.pids().values()}
    (launcher,) = parents
    return launcher
