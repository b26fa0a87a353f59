"""Recording and parts with parameters over experts that lie on several ranks, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekit.runtime import attach
from moekit.trace import record
from tests.parallel.jobs import step, tiny
from tests.parallel.pool import Pool
from tests.parts import Gain, stir

TOKENS = torch.randint(3, 100, (4, 10), generator=torch.Generator().manual_seed(5))


def alone(family: str) -> tuple[dict[str, Any], Any]:
    """A step, and the trace, of one process with the part on all experts."""
    model = tiny(family)
    attach(model, Gain())
    stir(model)
    return step(model, TOKENS), record(model, [TOKENS], fingerprint="")


@pytest.mark.parametrize(
    ("family", "dispatch", "gain_first"),
    [
        ("qwen2_moe", "once-per-rank", True),  # calls its experts before the shared ones
        ("deepseek_v3", "once-per-rank", False),  # after them
        ("gpt_oss", "all-gather", False),
    ],
)
def test_recorded_with_a_part_on_two_ranks_as_in_one_process(
    pool: Pool, family: str, dispatch: str, gain_first: bool
) -> None:
    whole, trace = alone(family)
    answers = pool.run(2, "tests.parallel.part_jobs.composed", family, dispatch, TOKENS, gain_first)
    for rank, answer in enumerate(answers):
        torch.testing.assert_close(answer["logits"], whole["logits"][rank::2], atol=1e-5, rtol=1e-4)
        assert answer["left"] == []
        for layer, index_NK in answer["choices"].items():
            mine = trace.indices(layer).view(*TOKENS.shape, -1)[rank::2].flatten(0, 1)
            assert torch.equal(index_NK.sort(-1).values, mine.sort(-1).values)
    learned = {name for name in whole["grads"] if "Gain" in name}
    assert learned
    for name in learned:
        total = sum(answer["grads"][name] for answer in answers)
        torch.testing.assert_close(total, whole["grads"][name], atol=1e-5, rtol=1e-4)


def test_what_would_need_all_weights_is_refused(pool: Pool) -> None:
    for said in pool.run(2, "tests.parallel.part_jobs.refused"):
        assert len(said) == 3
        assert all("a rank holds its own experts only" in words for words in said[:2])
        assert "the experts lie on several ranks" in said[2]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another call", "layer 1: Called is called with hidden, not with"),
        ("too few experts", "1 experts cannot be dealt to 2 ranks"),
        ("another batch", "needs ranks that hold the same tokens"),
    ],
)
def test_what_a_later_layer_refuses_leaves_the_whole_model(pool: Pool, what: str, words: str) -> None:
    for said, changed in pool.run(2, "tests.parallel.part_jobs.refused_half_way", what):
        assert words in said
        assert changed == []


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize("recorder_first", [False, True])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_rank_without_tokens_records_and_loses_nothing(
    pool: Pool, family: str, recorder_first: bool, expected: bool
) -> None:
    """One row of text for two ranks, then two; the same rows one after another in one process."""
    passes = [TOKENS[:1], TOKENS[1:3]]
    trace = record(tiny(family), [TOKENS[:1], TOKENS[1:2], TOKENS[2:3]], fingerprint="")
    job = "tests.parallel.part_jobs.recorded_without_tokens"
    full, empty = pool.run(2, job, family, passes, recorder_first, expected)
    length = TOKENS.shape[1]
    assert (full["tokens"], empty["tokens"]) == (2 * length, length)
    assert full["documents"] == [0] * length + [1] * length
    assert empty["documents"] == [0] * length
    for layer in trace.meta.layers:
        index_NK = trace.indices(layer)
        assert torch.equal(full["choices"][layer], index_NK[: 2 * length])
        assert torch.equal(empty["choices"][layer], index_NK[2 * length :])
    layers = len(trace.meta.layers)
    assert empty["losses"][0] == (0, 0, 0)
    for counted, balance, squares in (*full["losses"], empty["losses"][1]):
        assert counted == layers * length
        assert balance > 0
        assert squares > 0
    assert full["finite"]
    assert empty["finite"]


def test_a_batch_of_padding_keeps_no_other_rank_waiting(pool: Pool) -> None:
    assert pool.run(2, "tests.parallel.part_jobs.recorded_padding", TOKENS) == [3 * TOKENS.numel(), TOKENS.numel()]


def test_what_needs_all_weights_is_not_put_back_over_experts_dealt_out_meanwhile(pool: Pool) -> None:
    for said, there in pool.run(2, "tests.parallel.part_jobs.put_back"):
        assert "a rank holds its own experts only" in said
        assert there == ["Counting"]
