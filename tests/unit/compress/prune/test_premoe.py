"""PreMoe against numbers worked by hand and against two passes over all tokens."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from moekit.anatomy import Geometry, find_moe_layers
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.prune.premoe import PreMoe
from moekit.trace import record
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import BINS, resolve
from tests.families import FAMILIES, TOP_K, build, tokens

LOGITS = torch.tensor([[2.0, 1.0, -1.0, -3.0], [-0.5, -1.0, -2.0, -4.0], [1.0, 3.0, 0.0, 2.9]])


def inputs(method: PreMoe, logits_NE: torch.Tensor = LOGITS, top_k: int = 2) -> LayerInputs:
    experts = logits_NE.shape[1]
    stats = LayerStatistics.empty(resolve(method.required), experts, 4)
    if len(logits_NE):
        stats.update(TokenBatch(experts, logits_NE.topk(top_k).indices, logits=logits_NE))
    return LayerInputs(0, Geometry(4, experts, top_k, 8, 0, True, False, False, True), stats)


def near(method: PreMoe, expected: list[float], logits_NE: torch.Tensor = LOGITS) -> None:
    assert method.score(inputs(method, logits_NE)).tolist() == pytest.approx(expected, abs=1e-6)


def tcess(pool: int | None, threshold: float | str | None = None) -> PreMoe:
    return PreMoe(token_score="tcess", pool=pool, threshold=threshold)  # type: ignore[arg-type]


def test_tcess_of_the_worked_example() -> None:
    near(tcess(1), [0.5, 1.0, 0, 0])
    near(tcess(2, 0.6), [0.5, 0, 0, 0])
    near(tcess(None, 0.6), [0.5, 0, 0, 0])


def test_tcess_ranks_an_expert_chosen_once_above_one_that_is_twice_the_best() -> None:
    near(tcess(2), [0.5, 1.0, 0, 0.9666667])


def test_peu_of_the_worked_example() -> None:
    for method in (PreMoe(), PreMoe(pool=2)):
        assert method.cut(inputs(method)) == pytest.approx(0.6261657, abs=1e-6)
        near(method, [0.6666667, 0, 0, 0])


def test_peu_without_threshold_adds_what_every_pool_holds() -> None:
    # Expert 0: 2 and sigmoid(-0.5); expert 1: 1, sigmoid(-1) and 3; expert 3: 2.9.
    near(PreMoe(threshold=None), [(2 + 0.3775407) / 3, (1 + 0.2689414 + 3) / 3, 0, 2.9 / 3])
    near(PreMoe(threshold=0), [(2 + 0.3775407) / 3, (1 + 0.2689414 + 3) / 3, 0, 2.9 / 3])


def test_over_all_experts_without_threshold_tcess_is_the_mean_logit() -> None:
    near(tcess(4), LOGITS.mean(0).tolist())


def reference(method: PreMoe, logits_NE: torch.Tensor, pool: int, threshold: float | None) -> torch.Tensor:
    """Token by token in fp64, in two passes; `threshold` None is the adaptive one."""
    rows = []
    for logits_E in logits_NE.double():
        members = sorted(range(len(logits_E)), key=lambda e: (-float(logits_E[e]), e))[:pool]
        total = sum(float(logits_E[e].exp()) for e in members)
        rows.append({e: (float(logits_E[e]), float(logits_E[e].exp()) / total) for e in members})
    if threshold is None:
        threshold = sum(max(p for _, p in row.values()) for row in rows) / len(rows)
    # The bin that holds the threshold counts whole.
    threshold = int(threshold * BINS) / BINS
    sums = torch.zeros(logits_NE.shape[1], dtype=torch.float64)
    for row in rows:
        for expert, (logit, p) in row.items():
            value = logit if method.token_score == "tcess" else max(logit, 1 / (1 + 2.718281828459045**-logit))
            sums[expert] += value if p >= threshold else 0.0
    return sums / len(rows)


@pytest.mark.parametrize("token_score", ["peu", "tcess"])
@pytest.mark.parametrize(("pool", "threshold"), [(None, "adaptive"), (1, "adaptive"), (6, "adaptive"), (4, 0.25)])
def test_one_pass_gives_what_two_give(token_score: str, pool: int | None, threshold: float | str) -> None:
    logits_NE = torch.randn(300, 6, generator=torch.Generator().manual_seed(3)) * 2 - 1
    method = PreMoe(token_score=token_score, pool=pool, threshold=threshold)  # type: ignore[arg-type]
    fixed = None if threshold == "adaptive" else float(threshold)
    expected = reference(method, logits_NE, pool or 2, fixed)
    torch.testing.assert_close(method.score(inputs(method, logits_NE)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_of_a_recorded_model(family: str) -> None:
    model, seen = build(family), {}
    layers = find_moe_layers(model)
    for layer in layers:
        layer.require_router().register_forward_hook(
            lambda _m, _a, answer, index=layer.index: seen.__setitem__(index, answer[0].detach())
        )
    trace = record(model, [tokens()], statistics=PreMoe().required)
    for layer in layers:
        found = LayerInputs(layer.index, layer.geometry, trace.require(PreMoe().required)[layer.index])
        expected = reference(PreMoe(), seen[layer.index].float(), TOP_K, None)
        torch.testing.assert_close(PreMoe().score(found), expected, rtol=1e-4, atol=1e-5)


def test_the_statistics_asked_for() -> None:
    assert PreMoe().required == ("load", "pool_utility(0)", "pool_peak(0)")
    assert PreMoe(pool=8, threshold=0.5).required == ("load", "pool_utility(8)")
    assert tcess(1).required == ("load", "pool_logit(1)")


def test_no_tokens_score_0() -> None:
    near(PreMoe(), [0.0] * 4, torch.zeros(0, 4))


def test_impossible_settings() -> None:
    for wrong in ({"pool": 0}, {"threshold": 1.5}, {"threshold": -0.1}, {"threshold": "high"}, {"token_score": "x"}):
        with pytest.raises(ValidationError):
            PreMoe(**wrong)


def test_experts_that_no_token_chose_go_first() -> None:
    """With a threshold over a pool wider than the choice, an expert may score without ever being chosen."""
    method = PreMoe(pool=4, threshold=None)
    found = inputs(method)
    scores = method.score(found)
    assert float(scores[2]) > 0
    assert found.statistics.never_routed == [2]
    assert method.decide(found, scores, 3).keep == (0, 1, 3)
    assert method.decide(found, scores, 4).keep == (0, 1, 2, 3)
