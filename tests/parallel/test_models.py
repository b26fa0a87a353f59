"""Whole models with their experts on several ranks, against the same model in one process."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.errors import BadConfig
from moekit.placement import Placement
from tests.families import EXPERTS, FAMILIES
from tests.parallel.jobs import hook_routers, step, tiny
from tests.parallel.pool import Pool

DISPATCHERS = {record.name: record.cls for record in catalogue.methods("dispatch")}
TOKENS = torch.randint(3, 100, (4, 10), generator=torch.Generator().manual_seed(5))


@cache
def alone(family: str, policy: bool = False, experts: int = EXPERTS) -> dict[str, Any]:
    """One process, the whole batch."""
    return step(tiny(family, policy, _overrides(experts)), TOKENS)


def _overrides(experts: int) -> dict[str, Any]:
    return {} if experts == EXPERTS else {"num_experts": experts}


def _placement(size: int, family: str, experts: int = EXPERTS) -> Placement:
    generator = torch.Generator().manual_seed(1)
    layers = range(tiny(family).config.get_text_config().num_hidden_layers)
    groups = {n: torch.randint(size, (experts,), generator=generator).tolist() for n in layers}
    return Placement(devices=size, experts=experts, layers=groups, solver="random")


def check(answers: list[dict[str, Any]], whole: dict[str, Any], shared: bool) -> None:
    """Logits, loss and gradients of all ranks against those of one process."""
    size = len(answers)
    scale = whole["logits"].abs().max()
    for rank, answer in enumerate(answers):
        rows = whole["logits"] if shared else whole["logits"][rank::size]
        assert answer["logits"].shape == rows.shape
        assert bool(((answer["logits"] - rows).abs() <= 1e-5 * max(scale, 1)).all())
    total = answers[0]["loss"] if shared else sum(answer["loss"] for answer in answers)
    assert total == pytest.approx(whole["loss"], rel=1e-5)
    owned = answers[0]["owned"]
    for name, expected in whole["grads"].items():
        if name.rpartition(".")[0] in owned:
            found = torch.zeros_like(expected)
            for answer in answers:
                owned_here = answer["owned"][name.rpartition(".")[0]]
                if len(owned_here):
                    found[owned_here] = answer["grads"][name]
        elif shared:
            found = answers[0]["grads"][name]
        else:
            found = sum(answer["grads"][name] for answer in answers)
        error = (found - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error <= 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_logits_loss_and_gradients_are_those_of_one_process(pool: Pool, dispatch: str, family: str) -> None:
    for size in (1, 2, 4):
        if dispatch == "hierarchical" and size == 1:
            continue
        answers = pool.run(size, "tests.parallel.jobs.model_step", family, dispatch, TOKENS)
        check(answers, alone(family), DISPATCHERS[dispatch].needs_shared_batch)


@pytest.mark.parametrize("dispatch", DISPATCHERS)
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral", "glm4_moe", "olmoe"])
def test_placements_and_constraints_change_nothing(pool: Pool, dispatch: str, family: str) -> None:
    answers = pool.run(
        4, "tests.parallel.jobs.model_step", family, dispatch, TOKENS, placement=_placement(4, family), policy=True
    )
    check(answers, alone(family, True), DISPATCHERS[dispatch].needs_shared_batch)


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_blocks_may_be_uneven(pool: Pool, dispatch: str) -> None:
    overrides = {"num_experts": 7}
    answers = pool.run(4, "tests.parallel.jobs.model_step", "qwen2_moe", dispatch, TOKENS, overrides=overrides)
    check(answers, alone("qwen2_moe", experts=7), DISPATCHERS[dispatch].needs_shared_batch)


@pytest.mark.parametrize("dispatch", [n for n, cls in DISPATCHERS.items() if not cls.needs_shared_batch])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_rank_may_have_no_tokens(pool: Pool, dispatch: str, family: str) -> None:
    """One row of text for two ranks; with shared experts before and after the routed ones."""
    answers = pool.run(2, "tests.parallel.jobs.model_step", family, dispatch, TOKENS[:1])
    check(answers, step(tiny(family), TOKENS[:1]), shared=False)


@pytest.mark.parametrize("family", ["qwen2_moe", "ernie4_5_moe", "deepseek_v3"])
@pytest.mark.parametrize("what", ["indices", "weights"])
def test_a_hook_that_changes_the_choice_is_heard_or_refused(pool: Pool, family: str, what: str) -> None:
    """Families that call their shared experts first have dispatched before the hook runs."""
    answers = pool.run(2, "tests.parallel.jobs.hooked_step", family, what, TOKENS)
    for rank, answer in enumerate(answers):
        if isinstance(answer, str):
            assert "overlap=False" in answer
        else:
            assert (answer - hooked(family, what)[rank::2]).abs().max() <= 1e-5


@cache
def hooked(family: str, what: str) -> torch.Tensor:
    """Logits of the hooked model in one process."""
    model = tiny(family)
    hook_routers(model, what)
    return step(model, TOKENS)["logits"]


def test_eight_bits_on_the_way_out_are_close(pool: Pool) -> None:
    whole = alone("qwen3_moe")
    answers = pool.run(2, "tests.parallel.jobs.model_step", "qwen3_moe", "once-per-rank", TOKENS, codec="int8")
    exact = pool.run(2, "tests.parallel.jobs.model_step", "qwen3_moe", "once-per-rank", TOKENS)
    for rank, answer in enumerate(answers):
        error = (answer["logits"] - whole["logits"][rank::2]).norm() / whole["logits"].norm()
        assert 0 < error < 0.02
        assert answer["traffic"][0]["ranks"][1] < exact[rank]["traffic"][0]["ranks"][1]


def test_copies_of_experts_are_not_run_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    from moekit.parallel.sharding import _check_placement

    placement = _placement(2, "olmoe").model_copy(update={"replicas": {0: {0: [1]}}})
    layers = find_moe_layers(tiny("olmoe"))
    _check_placement(placement, layers, SimpleNamespace(size=2))  # type: ignore[arg-type]
    assert "copies" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"devices": 3}, "for 3 devices, not for 2 ranks"),
        ({"layers": {0: [0, 1] * 4}}, "layer 1: the placement places 0 experts"),
        ({"layers": {0: [0, 1] * 3, 1: [0, 1] * 3}, "experts": 6}, "places 6 experts, the layer has 8"),
    ],
)
def test_a_placement_for_something_else_is_refused(change: dict[str, Any], words: str) -> None:
    from moekit.parallel.sharding import _check_placement

    placement = _placement(2, "olmoe").model_copy(update=change)
    with pytest.raises(BadConfig, match=words):
        _check_placement(placement, find_moe_layers(tiny("olmoe")), SimpleNamespace(size=2))  # type: ignore[arg-type]


def test_experts_come_back_in_logical_order(pool: Pool) -> None:
    assert all(pool.run(4, "tests.parallel.jobs.regathered", "gpt_oss", _placement(4, "gpt_oss")))


def test_meshes_are_made_once(pool: Pool) -> None:
    assert pool.run(4, "tests.parallel.jobs.meshes") == [(True, 0)] * 4
