"""Dispatchers between real ranks: identity, rows against the replay, and whole models against one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from moekit import catalogue
from moekit.placement.replaying import replay
from tests.parallel.pool import Pool

# Of every registered dispatcher but those whose ranks all hold the same tokens, which `test_models` holds.
DISPATCHERS = [record.name for record in catalogue.methods("dispatch") if not record.cls.needs_shared_batch]


def _choices(tokens: int, experts: int, top_k: int, seed: int, holes: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    if holes and tokens:
        chosen[torch.rand(chosen.shape, generator=generator) < 0.2] = experts
    return chosen


@pytest.mark.parametrize("dispatch", DISPATCHERS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([1, 2, 4]),
    tokens=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    experts=st.integers(4, 11),
    top_k=st.integers(1, 4),
    holes=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_identity_experts_return_the_input(
    pool: Pool, dispatch: str, size: int, tokens: list[int], experts: int, top_k: int, holes: bool, seed: int
) -> None:
    if dispatch == "hierarchical" and size == 1:
        return
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(size, (experts,), generator=generator).tolist()
    indices = [_choices(n, experts, top_k, seed + rank, holes) for rank, n in enumerate(tokens[:size])]
    answers = pool.run(size, "tests.parallel.jobs.identity", dispatch, owner, indices, seed)
    for answer, chosen in zip(answers, indices, strict=True):
        # A token without any expert gets nothing.
        alive = (chosen < experts).any(1, keepdim=True)
        torch.testing.assert_close(answer["y"], answer["x"] * alive, rtol=0, atol=1e-12)
        torch.testing.assert_close(answer["grad"], torch.ones_like(answer["x"]) * alive, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dispatch", ["once-per-expert", "once-per-rank", "hierarchical"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from([2, 4]),
    tokens=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_rows_of_the_collectives_are_those_of_the_replay(
    pool: Pool, dispatch: str, size: int, tokens: list[int], top_k: int, seed: int
) -> None:
    experts = 9
    owner = torch.randint(size, (experts,), generator=torch.Generator().manual_seed(seed)).tolist()
    indices = [_choices(n, experts, top_k, seed + rank, False) for rank, n in enumerate(tokens[:size])]
    answers = pool.run(size, "tests.parallel.jobs.identity", dispatch, owner, indices, seed)
    home = torch.cat([torch.full((len(chosen),), rank) for rank, chosen in enumerate(indices)])
    nodes = 2 if dispatch == "hierarchical" else 1
    expected = replay(torch.cat(indices), owner, size, nodes=nodes, home=home)
    for direction in ("forward", "backward"):
        for way in ("dispatch", "combine"):
            sent = [answer["rows"]["ranks"].get((direction, way), [0]) for answer in answers]
            if dispatch == "hierarchical":
                across = sum(
                    count
                    for rank, answer in enumerate(answers)
                    for node, count in enumerate(answer["rows"]["nodes"].get((direction, way), [0]))
                    if node != rank // (size // 2)
                )
                assert across == expected.across_per_node
                inside = sum(
                    count
                    for rank, answer in enumerate(answers)
                    for place, count in enumerate(answer["rows"]["ranks"].get((direction, way), [0]))
                    if place != rank % (size // 2)
                )
                assert expected.node_rows_DD is not None
                travelled = expected.node_rows_DD.sum() - expected.node_rows_DD.trace()
                assert across + inside == travelled
            elif dispatch == "once-per-rank":
                assert sum(map(sum, sent)) == expected.rows_once_per_device
            else:
                assert sum(map(sum, sent)) == expected.rows_once_per_expert


@pytest.mark.parametrize("dispatch", DISPATCHERS)
@pytest.mark.parametrize(
    "indices",
    [
        [[[0, 1]] * 5, [[0, 1]] * 3, [[0, 1]], [[0, 1]] * 2],
        [[], [], [[3, 5]], []],
        [[[7, 6]], [], [], [[0, 7]] * 4],
    ],
    ids=["two experts get everything", "one token in all", "ranks without tokens"],
)
def test_lopsided_batches(pool: Pool, dispatch: str, indices: list[list[list[int]]]) -> None:
    chosen = [torch.tensor(rows, dtype=torch.int64).reshape(-1, 2) for rows in indices]
    answers = pool.run(4, "tests.parallel.jobs.identity", dispatch, [0, 0, 1, 1, 2, 2, 3, 3], chosen, 1)
    for answer in answers:
        torch.testing.assert_close(answer["y"], answer["x"], rtol=0, atol=1e-12)
        torch.testing.assert_close(answer["grad"], torch.ones_like(answer["x"]), rtol=0, atol=1e-12)
