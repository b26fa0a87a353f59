"""Who is silent, who is behind: from beats alone."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from moekit.errors import BadData, PeerLost
from moekit.parallel.launch.beats import Beat, BeatMonitor, Departure
from moekit.parallel.launch.health import Heartbeat, RankGone, is_lost_peer


def _hear(pulses: BeatMonitor, now: float, **counts: int) -> None:
    pulses.hear({int(name[1:]): Beat(count, 0, 0) for name, count in counts.items()}, now)


def test_a_beat_survives_its_text() -> None:
    beat = Beat(7, 12, 11, "left")
    assert Beat.parse(str(beat)) == beat


def test_silence_is_the_time_since_the_count_last_grew() -> None:
    pulses = BeatMonitor(longest_step=1.0)
    for now, one, two in [(0.0, 1, 1), (0.5, 2, 2), (1.0, 3, 2), (1.5, 4, 2), (2.0, 5, 2)]:
        _hear(pulses, now, r1=one, r2=two)
    assert pulses.silence == {1: 0.0, 2: 1.5}
    assert pulses.most_silent(1.5) == 2
    assert pulses.most_silent(1.6) is None
    assert pulses.most_silent(1.5, but=[2]) is None
    _hear(pulses, 2.5, r2=3)
    assert pulses.most_silent(0.1) is None


def test_the_longest_silence_is_named_first() -> None:
    pulses = BeatMonitor(longest_step=1.0)
    for now, one, two in [(0.0, 1, 1), (1.0, 2, 1), (2.0, 2, 1), (3.0, 2, 1)]:
        _hear(pulses, now, r1=one, r2=two)
    assert pulses.most_silent(1.0) == 2


def test_time_in_which_this_process_stood_still_does_not_count() -> None:
    pulses = BeatMonitor(longest_step=1.0)
    _hear(pulses, 0.0, r1=5)
    _hear(pulses, 600.0, r1=5)  # the whole job was suspended
    assert pulses.silence[1] == 1.0


def test_a_rank_that_has_left_is_not_silent() -> None:
    pulses = BeatMonitor(longest_step=10.0)
    for now in (0.0, 5.0):
        pulses.hear({1: Beat(3, 0, 0, "left")}, now)
    assert pulses.most_silent(1.0) is None


def test_the_rank_with_fewest_exchanges_is_behind() -> None:
    pulses = BeatMonitor(1.0)
    pulses.hear({1: Beat(1, 8, 8), 2: Beat(1, 9, 8), 3: Beat(1, 2, 2, "left")}, 0.0)
    rank, reason = pulses.behind(Beat(1, 9, 8)) or (None, "")
    assert rank == 1
    assert "entered 8 exchanges, this rank 9" in reason
    assert pulses.behind(Beat(1, 8, 8)) is None


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (PeerLost("x"), True),
        (dist.DistBackendError("NCCL"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (BadData("gloo"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_that_speak_of_another_rank(error: BaseException, lost: bool) -> None:
    assert is_lost_peer(error) is lost


def test_the_error_names_the_rank_in_its_last_line() -> None:
    error = RankGone(Departure(3, "silent", "no sign of life for 15 s", "rank 3 (pid 8 on host a)"))
    assert error.exit_code == 5
    assert error.message == "rank 3 (pid 8 on host a) is gone: no sign of life for 15 s"
    assert "rank 3" in str(error).splitlines()[-1]


@pytest.fixture
def pair() -> object:
    store = dist.HashStore()
    people = ["pid 1 on host a", "pid 2 on host b"]
    for rank in (0, 1):
        store.set(f"beat/{rank}", str(Beat(0, 0, 0)))
    # Far from ending the process that runs the tests.
    both = [Heartbeat(lambda: store, r, people, store_at="here", store_rank=0, stall_after=300) for r in (0, 1)]
    for heartbeat in both:
        heartbeat.start()
    yield both
    for heartbeat in both:
        heartbeat.stop()


def test_all_is_well_while_both_beat(pair: list[Heartbeat]) -> None:
    assert pair[0].who_is_gone(wait=1.0) is None


def test_what_one_tells_the_other_hears(pair: list[Heartbeat]) -> None:
    pair[1].tell("failed", "BadData: empty")
    found = pair[0].who_is_gone(wait=5.0)
    assert found == Departure(1, "failed", "BadData: empty", "rank 1 (pid 2 on host b)")
    assert pair[1].who_is_gone(wait=0.0) is None  # nobody names himself


def test_who_has_left_or_was_stopped_is_named_only_where_nothing_worse_is_known(pair: list[Heartbeat]) -> None:
    pair[1].tell("stopped", "by SIGTERM")
    found = pair[0].who_is_gone(wait=1.0)
    assert found is not None
    assert str(found) == "rank 1 (pid 2 on host b) was stopped: by SIGTERM"
    assert pair[0].gone_while_stopping(wait=5.0) is None
    pair[1].stop()
    found = pair[0].who_is_gone(wait=1.0)
    assert found is not None
    assert found.kind == "left"


def test_a_rank_whose_beats_cease_is_found(pair: list[Heartbeat], monkeypatch: pytest.MonkeyPatch) -> None:
    pair[1].stop("running")  # as if killed: it never said that it leaves
    monkeypatch.setattr(pair[0], "suspect_after", 0.5)
    found = pair[0].who_is_gone(wait=10.0)
    assert found is not None
    assert (found.rank, found.kind) == (1, "silent")
