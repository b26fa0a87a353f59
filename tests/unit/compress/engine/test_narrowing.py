"""What all methods that narrow experts share: which neurons stay, what is gathered, what is repaired and refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moekit.anatomy import Geometry
from moekit.compress.budget.sizes import Budget
from moekit.compress.budget.width import WidthBudget
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.narrowing import SlimMethod, neuron_sizes, select_neurons
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import budget_as
from moekit.compress.slim.magnitude import Magnitude
from moekit.compress.slim.random import Random
from moekit.compress.slim.slimmoe import SlimMoE
from moekit.compress.weights import LayerWeights, outputs
from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.trace.statistics import LayerStatistics

EXPERTS, HIDDEN, WIDTH, TOKENS, KEPT = 3, 10, 8, 400, 5
GEOMETRY = Geometry(HIDDEN, EXPERTS, 2, WIDTH, 0, True, False, False, True)
OUTCOME = LayerOutcome(keep=(0, 1, 2), width=KEPT)


def layer(*, biases: bool = False) -> LayerWeights:
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(EXPERTS, *size, generator=g) * 0.5

    made = LayerWeights(up_EIH=draw(WIDTH, HIDDEN), gate_EIH=draw(WIDTH, HIDDEN), down_EHI=draw(HIDDEN, WIDTH))
    if biases:
        more = {"up_bias_EI": draw(WIDTH), "gate_bias_EI": draw(WIDTH), "down_bias_EH": draw(HIDDEN)}
        made = dataclasses.replace(made, **more)
    return dataclasses.replace(made, router={"gate.weight": draw(HIDDEN)})


def given(expert: int) -> tuple[Tensor, Tensor]:
    """Tokens of an expert, in a few directions, and their gate weights."""
    g = torch.Generator().manual_seed(100 + expert)
    mix = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(7))
    x = torch.randn(TOKENS, 4, generator=g) @ mix + 0.1 * torch.randn(TOKENS, HIDDEN, generator=g)
    return x.double(), torch.rand(TOKENS, generator=g).double()


def inner(weights: LayerWeights, expert: int, x: Tensor) -> Tensor:
    assert weights.gate_EIH is not None
    up, gate = weights.up_EIH[expert].double(), weights.gate_EIH[expert].double()
    return torch.nn.functional.silu(x @ gate.T) * (x @ up.T)


def measured(weights: LayerWeights, unseen: tuple[int, ...] = ()) -> LayerInputs:
    moment, size = torch.zeros(EXPERTS, WIDTH, WIDTH).double(), torch.zeros(EXPERTS, WIDTH).double()
    load = torch.zeros(EXPERTS, dtype=torch.int64)
    for e in set(range(EXPERTS)) - set(unseen):
        x, w = given(e)
        h = inner(weights, e, x)
        moment[e], size[e], load[e] = (h * w[:, None] ** 2).T @ h, h.abs().sum(0), TOKENS
    statistics = LayerStatistics(EXPERTS, HIDDEN, values={"load": load, "inner_size": size}, width=WIDTH)
    return LayerInputs(5, GEOMETRY, statistics, read_gated=lambda expert: moment[expert])


def method(**knobs: object) -> SlimMoE:
    return SlimMoE.model_validate({"score": "output-norm", **knobs})


def test_all_neurons_kept_is_the_layer_bit_for_bit() -> None:
    weights = layer(biases=True)
    for repair in ("none", "least-squares"):
        made = method(repair=repair).transform(weights, LayerOutcome(keep=(0, 1, 2)), measured(weights))
        for field in dataclasses.fields(weights):
            one, two = getattr(weights, field.name), getattr(made, field.name)
            assert torch.equal(one, two) if isinstance(one, Tensor) else one.keys() == two.keys(), field.name
        seen = measured(weights)
        assert method(repair=repair).decide(seen, Tensor(), WIDTH).unchanged(EXPERTS)
        assert method(repair=repair).decide(seen, Tensor(), KEPT).width == KEPT


def test_each_expert_keeps_its_own_neurons_with_all_that_is_theirs() -> None:
    weights = layer(biases=True)
    seen = measured(weights)
    made = method(repair="none").transform(weights, OUTCOME, seen)
    sets = set()
    for e in range(EXPERTS):
        means = seen.statistics["inner_size"][e] / TOKENS
        scores = [float(means[k]) * float(weights.down_EHI[e, :, k].norm()) for k in range(WIDTH)]
        kept = sorted(sorted(range(WIDTH), key=lambda k: -scores[k])[:KEPT])
        sets.add(tuple(kept))
        for j, k in enumerate(kept):
            for name in ("up_EIH", "gate_EIH", "up_bias_EI", "gate_bias_EI"):
                assert torch.equal(getattr(made, name)[e, j], getattr(weights, name)[e, k]), name
            assert torch.equal(made.down_EHI[e, :, j], weights.down_EHI[e, :, k])
    assert len(sets) > 1
    assert torch.equal(made.down_bias_EH, weights.down_bias_EH)  # type: ignore[arg-type]
    assert torch.equal(made.router["gate.weight"], weights.router["gate.weight"])


@pytest.mark.parametrize("chosen", [method(), Magnitude(), Random()])
def test_repair_brings_outputs_nearer_and_tells_how_near(chosen: SlimMethod) -> None:
    weights = layer()
    seen = measured(weights)
    plain = chosen.model_copy(update={"repair": "none"})
    gaps, whole = [0.0, 0.0], 0.0
    for e in range(EXPERTS):
        x, w = given(e)
        before = outputs(weights, e, x, torch.nn.functional.silu)
        whole += float((before * w[:, None]).square().sum())
        for number, how in enumerate((plain, chosen)):
            made = how.transform(weights, OUTCOME, seen)
            gap = (outputs(made, e, x, torch.nn.functional.silu) - before) * w[:, None]
            gaps[number] += float(gap.square().sum())
    assert gaps[1] < 0.8 * gaps[0]
    told = chosen.told(weights, OUTCOME, seen)
    assert told["unrepaired"] == pytest.approx((gaps[0] / whole) ** 0.5, rel=1e-4)
    assert told["repaired"] == pytest.approx((gaps[1] / whole) ** 0.5, rel=1e-4)
    assert plain.told(weights, OUTCOME, seen) == {}
    assert chosen.told(weights, LayerOutcome(keep=(0, 1, 2)), seen) == {}


def test_only_down_projections_are_repaired_and_by_the_ridge_of_their_tokens() -> None:
    weights = layer()
    seen = measured(weights)
    plain, made = method(repair="none").transform(weights, OUTCOME, seen), method().transform(weights, OUTCOME, seen)
    assert torch.equal(made.up_EIH, plain.up_EIH)
    firm, rough = (method(ridge=r).transform(weights, OUTCOME, seen).down_EHI for r in (1e-4, 1e-2))
    assert torch.equal(made.down_EHI, firm)  # 400 tokens are more than 20 for each of 5 neurons
    seen.statistics["load"].fill_(20 * KEPT)
    assert torch.equal(method().transform(weights, OUTCOME, seen).down_EHI, rough)
    endless = method(ridge=1e12).transform(weights, OUTCOME, seen).down_EHI
    torch.testing.assert_close(endless, plain.down_EHI)


def test_an_expert_without_tokens_is_ranked_by_its_weights_and_not_repaired() -> None:
    weights = layer()
    seen = measured(weights, unseen=(1,))
    made = method().transform(weights, OUTCOME, seen)
    sizes = [float(weights.up_EIH[1, k].norm() * weights.down_EHI[1, :, k].norm()) for k in range(WIDTH)]
    kept = sorted(sorted(range(WIDTH), key=lambda k: -sizes[k])[:KEPT])
    assert torch.equal(made.up_EIH[1], weights.up_EIH[1, kept])
    assert torch.equal(made.down_EHI[1], weights.down_EHI[1][:, kept])
    assert method().unseen((1,), OUTCOME).endswith(": 1")


def test_scores_of_weights_do_not_depend_on_how_a_factor_is_shared() -> None:
    weights = layer()
    scaled = dataclasses.replace(weights, up_EIH=weights.up_EIH * 8, down_EHI=weights.down_EHI / 8)
    torch.testing.assert_close(neuron_sizes(scaled), neuron_sizes(weights))


def test_neurons_that_give_nothing_go_first_and_change_nothing() -> None:
    weights = layer()
    down = weights.down_EHI.clone()
    down[0, :, [1, 4, 6]] = 0
    down[1, :, [0, 2, 7]] = 0
    down[2, :, [3, 4, 5]] = 0
    weights = dataclasses.replace(weights, down_EHI=down)
    seen = measured(weights)
    for chosen in (method(), method(repair="none"), Magnitude(repair="none")):
        made = chosen.transform(weights, OUTCOME, seen)
        for e in range(EXPERTS):
            x, _ = given(e)
            silu = torch.nn.functional.silu
            torch.testing.assert_close(outputs(made, e, x, silu), outputs(weights, e, x, silu), rtol=1e-9, atol=1e-12)


def test_permuted_neurons_give_permuted_scores_and_the_same_function() -> None:
    weights = layer(biases=True)
    order_EI = torch.stack([torch.randperm(WIDTH, generator=torch.Generator().manual_seed(e)) for e in range(EXPERTS)])
    other = select_neurons(weights, order_EI)
    for chosen in (method(), Magnitude(repair="none")):
        one = chosen.neuron_scores(weights, measured(weights))
        two = chosen.neuron_scores(other, measured(other))
        torch.testing.assert_close(two, one.gather(1, order_EI))
        narrow = [chosen.transform(w, OUTCOME, measured(w)) for w in (weights, other)]
        for e in range(EXPERTS):
            made = [outputs(w, e, given(e)[0], torch.nn.functional.silu) for w in (weights, other, *narrow)]
            torch.testing.assert_close(made[0], made[1], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(made[2], made[3], rtol=1e-5, atol=1e-6)


def test_what_is_asked_for_depends_on_the_knobs() -> None:
    assert SlimMoE().required == ("load", "neuron_taylor_size")
    assert SlimMoE(score="fisher", repair="none").required == ("load", "neuron_fisher")
    assert (Magnitude().required, Magnitude(repair="none").required) == (("load",), ())
    alike = {"multiple": None, "repair": "least-squares", "ridge": 0.5}
    assert [(b.name, b.settings) for b in SlimMoE(ridge=0.5).baselines] == [("magnitude", alike), ("random", alike)]


def test_what_cannot_be_is_refused() -> None:
    weights = layer()
    seen = measured(weights)
    with pytest.raises(BadConfig, match="8 neurons cannot become 9 wide") as told:
        method().allocate({5: seen}, {}, WidthBudget(width=9), None)
    assert told.value.layer == 5
    with pytest.raises(BadConfig, match="statistics of 3 of 8"):
        method().transform(select_neurons(weights, torch.zeros(EXPERTS, 2, dtype=torch.int64)), OUTCOME, seen)
    odd = dataclasses.replace(weights, others={"slope": torch.ones(EXPERTS, WIDTH)})
    with pytest.raises(UnsupportedModel, match="belongs to which neuron"):
        select_neurons(odd, torch.zeros(EXPERTS, 1, dtype=torch.int64))
    with pytest.raises(BadConfig, match="how many neurons an expert keeps, not how many experts"):
        budget_as(Budget, WidthBudget(width=4))
    for moment, words in ((True, "second moment"), (False, "inner_size")):
        broken = measured(weights)
        (broken.gated_moment(2) if moment else broken.statistics["inner_size"][2])[0] = float("nan")
        with pytest.raises(NumericFault, match=words) as fault:
            method().transform(weights, OUTCOME, broken)
        assert (fault.value.layer, fault.value.expert) == (5, 2)
