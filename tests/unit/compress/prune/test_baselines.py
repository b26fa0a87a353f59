"""Baseline scores against numbers worked by hand, their identities, and slow references."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from moekit import catalogue
from moekit.anatomy import Geometry
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.prune.ean import EAN, MAN, MSAN, WeightedEAN
from moekit.compress.prune.frequency import Frequency
from moekit.compress.prune.gate_mass import GateMass
from moekit.compress.prune.power import PRESETS, Power
from moekit.compress.prune.random import Random
from moekit.compress.prune.reap import REAP
from moekit.compress.prune.soft_frequency import SoftFrequency
from moekit.compress.prune.wanda_expert import WandaExpert
from moekit.compress.weights import LayerWeights, outputs
from moekit.errors import NumericFault
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import resolve

LAYER = 3
ROUTED = [Frequency(), GateMass(), EAN(), MAN(), MSAN(), WeightedEAN(), REAP(), REAP(renormalise=False), Power()]
OUTPUTS = [EAN(), MAN(), MSAN(), WeightedEAN(), REAP(), REAP(renormalise=False), Power()]

SCORES_NE = torch.tensor(
    [
        [0.50, 0.30, 0.15, 0.05],
        [0.60, 0.20, 0.15, 0.05],
        [0.45, 0.35, 0.10, 0.10],
        [0.10, 0.30, 0.20, 0.40],
        [0.40, 0.30, 0.20, 0.10],
    ]
)
NORMS_E = torch.tensor([1.0, 2.0, 3.0, 10.0])


def worked_example(*, renormalise: bool) -> TokenBatch:
    """Five tokens, E = 4, K = 2, output norms constant."""
    weights_NK, indices_NK = SCORES_NE.topk(2)
    if renormalise:
        weights_NK = weights_NK / weights_NK.sum(1, keepdim=True)
    outputs_NKH = NORMS_E[indices_NK].unsqueeze(-1) * torch.tensor([0.6, 0.0, -0.8])
    return TokenBatch(4, indices_NK, weights=weights_NK, logits=SCORES_NE.log(), outputs=outputs_NKH)


def measured(method: PruneMethod, *batches: TokenBatch, hidden: int = 3, width: int = 0) -> LayerStatistics:
    stats = LayerStatistics.empty(resolve(method.required), batches[0].experts, hidden, ("a",), width=width)
    for seen in batches:
        stats.update(seen)
    return stats


def evidence_of(stats: LayerStatistics, weights: LayerWeights | None = None, **others: object) -> LayerInputs:
    geometry = Geometry(stats.hidden, stats.experts, 2, stats.width, 0, True, False, False, True)
    read = None if weights is None else lambda: weights
    return LayerInputs(LAYER, geometry, stats, read, **others)  # type: ignore[arg-type]


def scored(method: PruneMethod, seen: TokenBatch, hidden: int = 3) -> torch.Tensor:
    return method.score(evidence_of(measured(method, seen, hidden=hidden)))


def dropped(method: PruneMethod, inputs: LayerInputs, keep: int) -> set[int]:
    kept = method.decide(inputs, method.score(inputs), keep).keep
    return set(range(inputs.experts)) - set(kept)


@pytest.mark.parametrize(
    ("method", "renormalised", "scores", "first", "two"),
    [
        (Frequency(), True, [4, 5, 0, 1], 2, {2, 3}),
        (SoftFrequency(), True, [2.05, 1.45, 0.80, 0.70], 3, {2, 3}),
        (GateMass(), True, [2.5089286, 1.9196429, 0, 0.5714286], 2, {2, 3}),
        (EAN(), True, [4, 10, 0, 10], 2, {0, 2}),
        (MAN(), True, [1, 2, 0, 10], 2, {0, 2}),
        (MSAN(), True, [1, 4, 0, 100], 2, {0, 2}),
        (WeightedEAN(), True, [2.5089286, 3.8392857, 0, 5.7142857], 2, {0, 2}),
        (REAP(), True, [0.6272321, 0.7678571, 0, 5.7142857], 2, {0, 2}),
        (REAP(), False, [0.6272321, 0.7678571, 0, 5.7142857], 2, {0, 2}),
        (REAP(renormalise=False), True, [0.6272321, 0.7678571, 0, 5.7142857], 2, {0, 2}),
        (REAP(renormalise=False), False, [0.4875, 0.58, 0, 4], 2, {0, 2}),
    ],
    ids=repr,
)
def test_worked_example(
    method: PruneMethod, renormalised: bool, scores: list[float], first: int, two: set[int]
) -> None:
    inputs = evidence_of(measured(method, worked_example(renormalise=renormalised)))
    assert method.score(inputs).tolist() == pytest.approx(scores, abs=1e-6)
    assert dropped(method, inputs, 4) == set()
    assert dropped(method, inputs, 3) == {first}
    assert dropped(method, inputs, 2) == two


@pytest.mark.parametrize("method", ROUTED, ids=repr)
def test_an_expert_without_tokens_has_score_0_and_goes_first(method: PruneMethod) -> None:
    indices_NK = torch.tensor([[0, 3], [0, 1]])
    outputs_NKH = torch.tensor([[[1e6, 0.0], [0.0, 0.0]], [[2.0, 1.0], [1.0, 0.0]]])
    seen = TokenBatch(4, indices_NK, weights=torch.tensor([[0.9, 0.1], [0.5, 0.5]]), outputs=outputs_NKH)
    stats = measured(method, seen, hidden=2)
    scores_E = method.score(evidence_of(stats))
    assert bool(scores_E.isfinite().all())
    assert scores_E[2] == 0
    # Expert 3 has a token, but an output of zero: some methods score it 0 as well, and yet it stays longer than 2.
    assert dropped(method, evidence_of(stats), 3) == {2}


@pytest.mark.parametrize("method", [*ROUTED, SoftFrequency()], ids=repr)
def test_no_tokens_at_all_give_zeros(method: PruneMethod) -> None:
    stats = measured(method, TokenBatch(3, torch.zeros(0, 2, dtype=torch.int64)))
    assert method.score(evidence_of(stats)).tolist() == [0, 0, 0]
    assert dropped(method, evidence_of(stats), 2) == {2}


def test_of_equal_scores_the_lower_number_stays() -> None:
    stats = measured(Frequency(), TokenBatch(4, torch.tensor([[0, 1], [2, 3], [2, 1]])))
    assert dropped(Frequency(), evidence_of(stats), 3) == {3}
    assert dropped(Frequency(), evidence_of(stats), 2) == {0, 3}


# A layer of real experts: SwiGLU, a linear router, softmax over all and top-k.

E, H, INNER, TOKENS = 6, 5, 7, 40


def layer_weights(seed: int = 0) -> LayerWeights:
    g = torch.Generator().manual_seed(seed)
    up, gate = (torch.randn(E, INNER, H, generator=g) for _ in range(2))
    down = torch.randn(E, H, INNER, generator=g)
    return LayerWeights(up, down, gate, router={"weight": torch.randn(E, H, generator=g)})


def hidden_states(seed: int = 1, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed))


def gates(logits_NE: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    weights_NK, indices_NK = logits_NE.softmax(-1).topk(top_k)
    return (weights_NK / weights_NK.sum(-1, keepdim=True) if renormalise else weights_NK), indices_NK


def all_outputs(weights: LayerWeights, hidden_NH: torch.Tensor) -> torch.Tensor:
    """[N, E, H]."""
    silu = torch.nn.functional.silu
    return torch.stack([outputs(weights, e, hidden_NH, silu) for e in range(weights.experts)], dim=1)


def observe(
    weights: LayerWeights, hidden_NH: torch.Tensor, *, top_k: int = 2, renormalise: bool = True, scale: float = 1.0
) -> TokenBatch:
    logits_NE = hidden_NH @ weights.router_EH.T
    weights_NK, indices_NK = gates(logits_NE, top_k, renormalise)
    outputs_NKH = all_outputs(weights, hidden_NH).gather(1, indices_NK[..., None].expand(-1, -1, H))
    routed_NH = (outputs_NKH * weights_NK[..., None] * scale).sum(1)
    return TokenBatch(
        weights.experts,
        indices_NK,
        weights=weights_NK * scale,
        logits=logits_NE,
        outputs=outputs_NKH,
        hidden=hidden_NH,
        residual=hidden_NH.flip(1),
        routed=routed_NH,
    )


def test_sums_over_all_experts() -> None:
    seen = observe(layer_weights(), hidden_states())
    assert float(scored(Frequency(), seen, H).sum()) == TOKENS * 2
    assert float(scored(GateMass(), seen, H).sum()) == pytest.approx(TOKENS)
    assert float(scored(SoftFrequency(), seen, H).sum()) == pytest.approx(TOKENS)


def test_sums_are_counts_times_means() -> None:
    seen = observe(layer_weights(), hidden_states(), renormalise=False)
    load_E = scored(Frequency(), seen, H)
    assert 0 < int(load_E.min()) < int(load_E.max())
    torch.testing.assert_close(scored(WeightedEAN(), seen, H), load_E * scored(REAP(renormalise=False), seen, H))
    torch.testing.assert_close(scored(EAN(), seen, H), load_E * scored(MAN(), seen, H))


@pytest.mark.parametrize("method", [*ROUTED, SoftFrequency(), Power(token=1, count=0)], ids=repr)
def test_batches_and_ranks_add_up(method: PruneMethod) -> None:
    weights, hidden_NH = layer_weights(), hidden_states()
    parts = [observe(weights, part) for part in hidden_NH.split([1, 24, 15])]
    whole = method.score(evidence_of(measured(method, observe(weights, hidden_NH), hidden=H)))
    one_run = measured(method, *parts, hidden=H)
    merged = measured(method, parts[0], hidden=H).merge(measured(method, *parts[1:], hidden=H))
    for stats in (one_run, merged):
        torch.testing.assert_close(method.score(evidence_of(stats)), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "factor"),
    [(EAN(), 2), (MAN(), 2), (WeightedEAN(), 2), (REAP(), 2), (MSAN(), 4), (Frequency(), 1), (GateMass(), 1)],
    ids=repr,
)
def test_doubling_a_down_projection(method: PruneMethod, factor: int) -> None:
    weights = layer_weights()
    down = weights.down_EHI.clone()
    down[4] *= 2
    expected_E = scored(method, observe(weights, hidden_states()), H)
    expected_E[4] *= factor
    doubled = dataclasses.replace(weights, down_EHI=down)
    torch.testing.assert_close(scored(method, observe(doubled, hidden_states()), H), expected_E)


@pytest.mark.parametrize("renormalise", [True, False])
def test_one_choice_with_renormalised_gates_makes_reap_man(renormalise: bool) -> None:
    seen = observe(layer_weights(), hidden_states(), top_k=1, renormalise=renormalise)
    torch.testing.assert_close(scored(REAP(), seen, H), scored(MAN(), seen, H))
    plain = scored(REAP(renormalise=False), seen, H)
    assert torch.allclose(plain, scored(MAN(), seen, H)) == renormalise


def test_renormalised_gates_forget_the_scaling_factor() -> None:
    weights = layer_weights()
    plain, scaled = observe(weights, hidden_states()), observe(weights, hidden_states(), scale=2.5)
    torch.testing.assert_close(scored(REAP(), scaled, H), scored(REAP(), plain, H))
    off = REAP(renormalise=False)
    torch.testing.assert_close(scored(off, scaled, H), 2.5 * scored(off, plain, H))


@pytest.mark.parametrize("method", [*ROUTED, SoftFrequency(), Random()], ids=repr)
def test_keeping_all_changes_no_bit(method: PruneMethod) -> None:
    weights = layer_weights()
    inputs = evidence_of(measured(method, observe(weights, hidden_states()), hidden=H), weights)
    outcome = method.decide(inputs, method.score(inputs), E)
    assert outcome.keep == tuple(range(E))
    after = method.transform(weights, outcome, inputs)
    assert torch.equal(after.router_EH, weights.router_EH)
    for name in ("up_EIH", "down_EHI", "gate_EIH"):
        assert torch.equal(getattr(after, name), getattr(weights, name))


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("method", [Frequency(), REAP(), Random()], ids=repr)
def test_masking_equals_slicing(method: PruneMethod, renormalise: bool) -> None:
    weights, hidden_NH = layer_weights(), hidden_states()
    inputs = evidence_of(measured(method, observe(weights, hidden_NH), hidden=H), weights, seed=5)
    outcome = method.decide(inputs, method.score(inputs), 3)
    sliced = method.transform(weights, outcome, inputs)
    assert sliced.experts == 3

    def block(layer: LayerWeights, gone: list[int]) -> torch.Tensor:
        logits_NE = hidden_NH @ layer.router_EH.T
        logits_NE[:, gone] = float("-inf")
        weights_NK, indices_NK = gates(logits_NE, 2, renormalise)
        chosen_NKH = all_outputs(layer, hidden_NH).gather(1, indices_NK[..., None].expand(-1, -1, H))
        return (chosen_NKH * weights_NK[..., None]).sum(1)

    masked_NH = block(weights, [e for e in range(E) if e not in outcome.keep])
    assert not torch.allclose(masked_NH, block(weights, []), atol=1e-3)
    torch.testing.assert_close(block(sliced, []), masked_NH)


@pytest.mark.parametrize("method", OUTPUTS, ids=repr)
def test_an_expert_of_nan_weights_is_named(method: PruneMethod) -> None:
    weights = layer_weights()
    weights.down_EHI[4, 0, 0] = float("nan")
    inputs = evidence_of(measured(method, observe(weights, hidden_states()), hidden=H))
    scores_E = method.score(inputs)
    with pytest.raises(NumericFault) as caught:
        method.decide(inputs, scores_E, 3)
    assert (caught.value.layer, caught.value.expert) == (LAYER, 4)


# Wanda


def wanda_evidence(weights: LayerWeights, hidden_NH: torch.Tensor) -> tuple[LayerInputs, TokenBatch]:
    seen = observe(weights, hidden_NH)
    assert weights.gate_EIH is not None
    every_NEI = torch.nn.functional.silu(torch.einsum("nh,eih->nei", hidden_NH, weights.gate_EIH)) * torch.einsum(
        "nh,eih->nei", hidden_NH, weights.up_EIH
    )
    inner_NKI = every_NEI.gather(1, seen.indices_NK[..., None].expand(-1, -1, INNER))
    seen = dataclasses.replace(seen, inner=inner_NKI)
    return evidence_of(measured(WandaExpert(), seen, hidden=H, width=INNER), weights), seen


def test_wanda_against_a_loop_over_single_weights() -> None:
    weights, hidden_NH = layer_weights(), hidden_states()
    inputs, seen = wanda_evidence(weights, hidden_NH)
    assert seen.inner is not None
    assert weights.gate_EIH is not None
    expected = []
    for expert in range(E):
        token_n, slot_n = (seen.indices_NK == expert).nonzero(as_tuple=True)
        x_nH, z_nI = hidden_NH[token_n].double(), seen.inner[token_n, slot_n].double()
        values = []
        for matrix, input_nb in ((weights.gate_EIH, x_nH), (weights.up_EIH, x_nH), (weights.down_EHI, z_nI)):
            for row in matrix[expert].tolist():
                for b, weight in enumerate(row):
                    values.append(abs(weight) * sum(v * v for v in input_nb[:, b].tolist()) ** 0.5)
        expected.append(sum(values) / len(values))
    assert WandaExpert().score(inputs).tolist() == pytest.approx(expected, rel=1e-5)


def test_wanda_by_hand_without_a_gate() -> None:
    # |up| columns sum to (4, 2), |down| columns to (1, 0.5); norms of inputs (3, 1), of inner values (2, 4).
    up, down = torch.tensor([[[1.0, -2.0], [-3.0, 0.0]]]), torch.tensor([[[0.5, 0.5], [-0.5, 0.0]]])
    values = {"load": torch.tensor([1]), "input_square": torch.tensor([[9.0, 1.0]])}
    values["inner_square"] = torch.tensor([[4.0, 16.0]])
    stats = LayerStatistics(1, 2, ("a",), 1, values)
    score_E = WandaExpert().score(evidence_of(stats, LayerWeights(up, down)))
    assert score_E.tolist() == pytest.approx([(4 * 3 + 2 * 1 + 1 * 2 + 0.5 * 4) / 8])


def test_wanda_names_damaged_weights_and_ranks_unseen_experts_last() -> None:
    weights = layer_weights()
    weights.router["weight"][3] = 0
    hidden_NH = hidden_states().abs()
    weights.router["weight"][0] = 9
    weights.router["weight"][1] = 8
    inputs, seen = wanda_evidence(weights, hidden_NH)
    assert 3 not in seen.indices_NK
    scores_E = WandaExpert().score(inputs)
    assert scores_E[3] == 0
    assert 3 not in WandaExpert().decide(inputs, scores_E, 2).keep
    weights.up_EIH[1, 0, 0] = float("nan")
    with pytest.raises(NumericFault) as caught:
        WandaExpert().decide(inputs, WandaExpert().score(inputs), 3)
    assert (caught.value.layer, caught.value.expert) == (LAYER, 1)


# The general family

NAMED: dict[str, PruneMethod] = {
    "frequency": Frequency(),
    "gate-mass": GateMass(),
    "ean": EAN(),
    "man": MAN(),
    "msan": MSAN(),
    "weighted-ean": WeightedEAN(),
    "reap": REAP(renormalise=False),
}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_presets_are_the_named_methods(name: str) -> None:
    seen = observe(layer_weights(), hidden_states(), renormalise=False)
    torch.testing.assert_close(scored(PRESETS[name], seen, H), scored(NAMED[name], seen, H))


def test_the_preset_of_easy_ep_is_its_statistic() -> None:
    assert set(PRESETS) == {*NAMED, "easy-ep"}
    seen = observe(layer_weights(), hidden_states())
    stats = LayerStatistics.empty(resolve(["residual_change_weighted_output_norm"]), E, H)
    stats.update(seen)
    assert float(stats["residual_change_weighted_output_norm"].min()) > 0
    torch.testing.assert_close(scored(PRESETS["easy-ep"], seen, H), stats["residual_change_weighted_output_norm"])


def test_a_count_between_sum_and_mean() -> None:
    seen = observe(layer_weights(), hidden_states())
    load_E = scored(Frequency(), seen, H)
    half = scored(Power(gate=0, norm=1, count=0.5), seen, H)
    torch.testing.assert_close(half, scored(EAN(), seen, H) / load_E.sqrt())


def test_exponents_are_named_exactly_or_refused() -> None:
    assert Power(token=0.5, gate=0, norm=2, count=3).required == ("load", "power(0.5,0,2)")
    for bad in (-1.0, 9.0, 0.12345):
        with pytest.raises(ValidationError):
            Power(norm=bad)


# Random


def test_random_is_repeatable_and_independent_by_layer_and_seed() -> None:
    stats = LayerStatistics(64, 3)
    first = Random().score(evidence_of(stats, seed=1))
    assert torch.equal(first, Random().score(evidence_of(stats, seed=1)))
    assert not torch.equal(first, Random().score(evidence_of(stats, seed=2)))
    assert not torch.equal(first, Random().score(dataclasses.replace(evidence_of(stats, seed=1), layer=4)))
    assert first.shape == (64,)
    assert len(set(first.tolist())) == 64


def test_random_keeps_every_expert_about_equally_often() -> None:
    stats = LayerStatistics(8, 3)
    kept = torch.zeros(8)
    for seed in range(400):
        inputs = evidence_of(stats, seed=seed)
        kept[list(Random().decide(inputs, Random().score(inputs), 4).keep)] += 1
    # 200 of 400 on average, standard deviation 10.
    assert 150 < float(kept.min()) <= float(kept.max()) < 250


@pytest.mark.parametrize("method", [*ROUTED, SoftFrequency(), Random(), WandaExpert()], ids=repr)
def test_records_name_what_the_defaults_need(method: PruneMethod) -> None:
    record = catalogue.of(type(method))
    assert record.kind == "prune"
    assert record.needs == type(method)().required
    assert [entry.name for entry in resolve(method.required)] == list(method.required)
