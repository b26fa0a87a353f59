"""What ranks state, and how their differences are told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from pydantic import BaseModel

from moekit.errors import BadConfig
from moekit.parallel.launch.agreement import NotHeard, agree_through, compare, disagreement, name_ranks, statements


class _Config(BaseModel):
    top_k: int = 2
    inner: dict[str, float] = {"lr": 0.1}


def test_models_and_mappings_are_taken_apart_by_key() -> None:
    told = statements({"config": _Config(), "plan": "ab", "empty": {}})
    assert sorted(told) == ["config.inner.lr", "config.top_k", "empty", "plan"]
    assert told["config.inner.lr"].text == "0.1"


def test_values_that_print_alike_but_are_not_differ() -> None:
    assert statements({"x": 2})["x"].digest != statements({"x": "2"})["x"].digest


def test_long_values_that_differ_at_the_end_show_it() -> None:
    one, two = (statements({"x": "a" * 200 + end})["x"] for end in "bc")
    assert one.text != two.text
    assert len(one.text) <= 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_count_by_type_shape_and_bytes(dtype: torch.dtype) -> None:
    x = torch.arange(6).to(dtype)
    same, reshaped, other = x.clone(), x.view(2, 3), x + 1
    digests = [statements({"x": value})["x"].digest for value in (x, same, reshaped, other, x.double())]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert statements({"x": torch.tensor(3.0)})["x"].text.startswith("float32[]")


def _told(**values: object) -> dict[int, object]:
    return {int(name[1:]): statements({"x": value}) for name, value in values.items()}


def test_the_odd_rank_is_named_against_the_majority() -> None:
    assert compare(_told(r0=1, r1=2, r2=2, r3=2)) == ["x: rank 0 has 1; ranks 1-3 have 2"]  # type: ignore[arg-type]


def test_without_a_majority_rank_0_counts() -> None:
    assert compare(_told(r0=1, r1=2)) == ["x: rank 1 has 2; rank 0 has 1"]  # type: ignore[arg-type]
    assert compare(_told(r0=1, r1=2, r2=2, r3=3)) == [  # type: ignore[arg-type]
        "x: ranks 1, 2 have 2, rank 3 has 3; rank 0 has 1"
    ]


def test_equal_ranks_have_nothing_to_tell() -> None:
    assert compare(_told(r0=1, r1=1)) == []  # type: ignore[arg-type]


def test_a_fact_that_one_rank_does_not_state_is_a_difference() -> None:
    told = {0: statements({"x": 1, "y": 2}), 1: statements({"x": 1})}
    assert compare(told) == ["y: rank 1 has nothing; rank 0 has 2"]


def test_many_differences_are_cut_short() -> None:
    error = disagreement([f"fact {i}" for i in range(5)])
    assert "fact 2; and 2 more" in error.message
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("ranks", "name"),
    [([2], "rank 2"), ([3, 1], "ranks 1, 3"), ([0, 1], "ranks 0, 1"), (range(6), "ranks 0-5")],
)
def test_names_of_ranks(ranks: list[int], name: str) -> None:
    assert name_ranks(ranks) == name


def _all(facts: list[dict[str, object]], bound: float = 10.0) -> list[BaseException | None]:
    store = dist.HashStore()

    def one(rank: int) -> BaseException | None:
        try:
            agree_through(store, rank, len(facts), "topic", facts[rank], bound)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(one, range(len(facts))))


def test_ranks_that_agree_go_on() -> None:
    assert _all([{"config": _Config(), "world": 3}] * 3) == [None] * 3


def test_all_ranks_raise_the_same() -> None:
    errors = _all([{"config": _Config()}, {"config": _Config(top_k=4)}, {"config": _Config()}])
    assert all(isinstance(error, BadConfig) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "config.top_k: rank 1 has 4; ranks 0, 2 have 2" in str(errors[0])


def test_a_silent_rank_is_named_in_time() -> None:
    with pytest.raises(NotHeard, match=r"ranks 1, 2 did not say within 0\.2 s") as caught:
        agree_through(dist.HashStore(), 0, 3, "topic", {"x": 1}, 0.2)
    assert caught.value.ranks == (1, 2)
    assert caught.value.exit_code == 5
