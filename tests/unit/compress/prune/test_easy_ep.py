"""EASY-EP against numbers worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from moekit.anatomy import Geometry
from moekit.compress.engine.dropping import ranking
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.prune.easy_ep import EasyEP, mix_domains
from moekit.data.batches import Batch
from moekit.errors import BadConfig
from moekit.trace import record
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import resolve
from tests.families import FAMILIES, build, tokens

EVERY = [
    "load",
    "gate_mass",
    "gated_output_norm",
    "residual_change_weighted_output_norm",
    "domain_gated_output_norm",
    "domain_residual_change_weighted_output_norm",
]


def inputs(*seen: TokenBatch, domains: tuple[str, ...] = ("maths",), names: list[str] = EVERY) -> LayerInputs:
    experts, hidden = seen[0].experts, 2
    stats = LayerStatistics.empty(resolve(names), experts, hidden, domains)
    for part in seen:
        stats.update(part)
    return LayerInputs(3, Geometry(hidden, experts, 2, 8, 0, True, False, False, True), stats)


def example(scale: float = 1.0) -> TokenBatch:
    """Two tokens, three experts of two channels; outputs of expert 1 times `scale`, what the layer adds as it was."""
    outputs_NKH = torch.tensor([[[0.0, 2.0], [4.0, 0.0]], [[1.0, 1.0], [2.0, 2.0]]])
    weights_NK = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    routed_NH = (weights_NK.unsqueeze(-1) * outputs_NKH).sum(1)
    chosen_NK = torch.tensor([[0, 1], [1, 2]])
    return TokenBatch(
        3,
        chosen_NK,
        domain=torch.zeros(2),
        weights=weights_NK,
        outputs=torch.where((chosen_NK == 1)[..., None], outputs_NKH * scale, outputs_NKH),
        residual=torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        routed=routed_NH,
    )


def single(choices: list[int], norms: list[float], domain: list[int], domains: int) -> TokenBatch:
    """Tokens of one choice each, of weight 1 and token weight 1: what is added turns h = (1, 0) into (0, 1)."""
    count = len(choices)
    return TokenBatch(
        3,
        torch.tensor(choices)[:, None],
        domains=domains,
        domain=torch.tensor(domain),
        weights=torch.ones(count, 1),
        outputs=torch.tensor(norms)[:, None, None] * torch.tensor([0.6, 0.8]),
        residual=torch.tensor([[1.0, 0.0]]).expand(count, 2),
        routed=torch.tensor([[-1.0, 1.0]]).expand(count, 2),
    )


def near(scores: torch.Tensor, expected: list[float]) -> None:
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mix", ["auto", "sum"])
def test_the_worked_example(mix: str) -> None:
    found = inputs(example())
    near(EasyEP(mix=mix).score(found), [0.30, 0.20, 0.0])
    near(EasyEP(mix=mix, token_weight=False).score(found), [1.5, 1.7071068, 1.4142136])
    near(found.statistics["gate_mass"], [0.75, 0.75, 0.5])


def test_the_token_weight_changes_who_stays() -> None:
    found = inputs(example())
    kept = {}
    for weigh in (True, False):
        method = EasyEP(token_weight=weigh)
        kept[weigh] = method.decide(found, method.score(found), 1).keep
    assert kept == {True: (0,), False: (1,)}


def test_one_domain_normalised_ranks_alike() -> None:
    near(EasyEP(mix="domains").score(inputs(example())), [0.6, 0.4, 0.0])


def test_with_unit_norms_and_token_weights_it_is_the_gate_mass() -> None:
    g = torch.Generator().manual_seed(0)
    chosen_NK = torch.rand(50, 3, generator=g).topk(2).indices
    gates_NK = torch.rand(50, 2, generator=g)
    gates_NK = gates_NK / gates_NK.sum(1, keepdim=True)
    seen = TokenBatch(
        3,
        chosen_NK,
        domain=torch.zeros(50),
        weights=gates_NK,
        outputs=torch.tensor([0.6, -0.8]).expand(50, 2, 2),
        residual=torch.tensor([[2.0, 0.0]]).expand(50, 2),
        routed=torch.tensor([[-2.0, 3.0]]).expand(50, 2),
    )
    mass = [float(gates_NK[chosen_NK == e].sum()) for e in range(3)]
    assert EasyEP().score(inputs(seen)).tolist() == pytest.approx(mass, rel=1e-5)


def test_without_token_weights_it_is_the_load_times_the_conditional_mean() -> None:
    found, seen = inputs(example()), example()
    expected = [0.0, 0.0, 0.0]
    for expert in range(3):
        terms = [
            float(seen.weights_NK[t, k]) * float(seen.outputs_NKH[t, k].norm())
            for t in range(2)
            for k in range(2)
            if int(seen.indices_NK[t, k]) == expert
        ]
        expected[expert] = len(terms) * (sum(terms) / len(terms))
    assert found.statistics["load"].tolist() == [1, 2, 1]
    near(EasyEP(token_weight=False).score(found), expected)


def test_a_louder_expert_scores_higher_in_proportion() -> None:
    near(EasyEP().score(inputs(example(scale=5.0))), [0.30, 1.0, 0.0])


def test_tokens_that_the_experts_do_not_turn_count_nothing() -> None:
    seen = single([0, 1], [2.0, 3.0], [0, 0], 1)
    straight = TokenBatch(
        3,
        seen.indices_NK,
        domain=seen.domain,
        weights=seen.weights,
        outputs=seen.outputs,
        residual=torch.tensor([[1.0, 2.0], [3.0, -1.0]]),
        routed=torch.tensor([[2.0, 4.0], [0.3, -0.1]]),
    )
    near(EasyEP().score(inputs(straight)), [0.0, 0.0, 0.0])


# Sums of the domains: [1, 3, 0] and [10, 0, 10].
TWO = single([0, 1, 0, 2], [1.0, 3.0, 10.0, 10.0], [0, 0, 1, 1], 2)


@pytest.mark.parametrize("token_weight", [True, False])
def test_domains_have_the_same_say_whatever_their_length(token_weight: bool) -> None:
    found = inputs(TWO, domains=("maths", "code"))
    near(EasyEP(mix="sum", token_weight=token_weight).score(found), [11, 3, 10])
    near(EasyEP(token_weight=token_weight).score(found), [0.75, 0.75, 0.5])
    near(EasyEP(domain_weights={"code": 3.0}, token_weight=token_weight).score(found), [1.75, 0.75, 1.5])
    near(EasyEP(domain_weights={"maths": 0.0}, token_weight=token_weight).score(found), [0.5, 0.0, 0.5])


def test_a_domain_without_tokens_adds_nothing() -> None:
    found = inputs(replace(TWO, domains=3), domains=("maths", "code", "law"))
    near(EasyEP().score(found), [0.75, 0.75, 0.5])
    near(mix_domains(torch.zeros(2, 3), ("a", "b"), {}), [0, 0, 0])


def test_impossible_domain_weights() -> None:
    found = inputs(TWO, domains=("maths", "code"))
    with pytest.raises(BadConfig, match="'cod'") as caught:
        EasyEP(domain_weights={"cod": 2.0}).score(found)
    assert "'code'" in str(caught.value.hint)
    with pytest.raises(BadConfig, match="weighs 0"):
        EasyEP(domain_weights={"maths": 0.0, "code": 0.0}).score(found)
    with pytest.raises(ValidationError):
        EasyEP(mix="sum", domain_weights={"code": 2.0})
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValidationError):
            EasyEP(domain_weights={"code": wrong})


def test_batches_add_up() -> None:
    g = torch.Generator().manual_seed(1)

    def rows(start: int, stop: int) -> TokenBatch:
        return TokenBatch(
            3,
            chosen[start:stop],
            domains=2,
            domain=domain[start:stop],
            weights=gates[start:stop],
            outputs=outputs[start:stop],
            residual=residual[start:stop],
            routed=routed[start:stop],
        )

    chosen, gates = torch.rand(90, 3, generator=g).topk(2).indices, torch.rand(90, 2, generator=g)
    outputs, domain = torch.randn(90, 2, 2, generator=g), torch.randint(0, 2, (90,), generator=g)
    residual, routed = torch.randn(90, 2, generator=g), torch.randn(90, 2, generator=g)
    whole = inputs(rows(0, 90), domains=("a", "b"))
    parts = inputs(rows(0, 7), rows(7, 60), rows(60, 90), domains=("a", "b"))
    for method in EasyEP.examples(whole.geometry):
        torch.testing.assert_close(method.score(whole), method.score(parts), rtol=1e-6, atol=1e-9)


def test_all_experts_stay_where_all_may_and_equal_scores_keep_the_lower() -> None:
    found = inputs(single([0, 2], [1.0, 1.0], [0, 0], 1))
    scores = EasyEP().score(found)
    assert EasyEP().decide(found, scores, 3).keep == (0, 1, 2)
    assert EasyEP().decide(found, scores, 2).keep == (0, 2)  # no token chose expert 1
    assert EasyEP().decide(found, scores, 1).keep == (0,)
    assert ranking(scores, found).tolist()[1] == float("-inf")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_domains_of_a_recorded_model_are_those_of_separate_runs(family: str) -> None:
    model, ids = build(family), tokens()
    domain_BS = torch.tensor([[0], [1]]).expand(ids.shape)
    both = Batch(ids, torch.ones_like(ids), domain_BS.int(), domain_BS.short(), ("a", "b"))
    names = ["residual_change_weighted_output_norm", "gated_output_norm", *(f"domain_{n}" for n in EVERY[2:4])]
    whole = record(model, [both], statistics=names).statistics
    alone = [record(model, [row[None]], statistics=names).statistics for row in ids]
    assert whole is not None
    for layer in whole:
        for name in EVERY[2:4]:
            of_domain_DE = whole[layer][f"domain_{name}"]
            torch.testing.assert_close(of_domain_DE.sum(0), whole[layer][name], rtol=1e-9, atol=1e-12)
            expected_DE = torch.stack([part[layer][name] for part in alone if part is not None])
            torch.testing.assert_close(of_domain_DE, expected_DE, rtol=1e-3, atol=1e-5)
