"""Variables of a launcher, whole, half and wrong."""

from __future__ import annotations

import pytest

from moekit.errors import BadConfig
from moekit.parallel.launch.environment import Environment, seconds

FULL = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "9",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip


def test_a_launcher_says_it_all() -> None:
    assert Environment.read(FULL) == Environment(5, 8, 1, 4, "a", 9, True, "2")


def test_no_launcher_means_one_rank() -> None:
    assert Environment.read({}) == Environment()
    assert Environment.read({"WORLD_SIZE": "1", "RANK": "0"}).world == 1


def test_ranks_started_by_hand_need_not_say_where_they_stand_on_the_machine() -> None:
    read = Environment.read({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"})
    assert (read.local_rank, read.local_world, read.launcher_holds_store) == (1, 2, False)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(BadConfig, match=name):
        Environment.read({key: value for key, value in FULL.items() if key != name})


@pytest.mark.parametrize("text", ["-1", "two", "1.5"])
def test_what_is_no_number_is_named(text: str) -> None:
    with pytest.raises(BadConfig, match="RANK is"):
        Environment.read(FULL | {"RANK": text})


def test_time_outs_come_from_the_caller_then_a_variable_then_the_default() -> None:
    assert seconds(2, "X", 9.0, {"X": "3"}) == 2
    assert seconds(None, "X", 9.0, {"X": "3.5"}) == 3.5
    assert seconds(None, "X", 9.0, {}) == 9.0
    for text in ("0", "-1", "soon", "nan", "inf"):
        with pytest.raises(BadConfig, match="X is"):
            seconds(None, "X", 9.0, {"X": text})
    with pytest.raises(BadConfig, match="a time-out is"):
        seconds(0, "X", 9.0, {})
