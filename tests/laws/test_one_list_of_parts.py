"""A layer's experts have one list of parts: recording, parts of a record and expert parallelism stand in it together.

Legend: N tokens, K choices, H hidden, E experts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moekit.anatomy import find_moe_layers
from moekit.parallel import Ranks, expert_parallel, gather_experts, shards
from moekit.runtime import attach, attached, detach
from moekit.runtime.experts import ExpertsInputs, ExpertsPart
from moekit.trace import Recorder
from tests.families import EXPERTS, build, logits, tokens
from tests.parts import Gain, leftovers, plain, stir

FAMILY = "qwen2_moe"  # its shared experts are computed while rows travel


class Recorded:
    """A recorder on a model, for as long as a test wants."""

    def __init__(self, model: Any) -> None:
        self.recorder = Recorder(model, weights=True, statistics=("basic", "router", "inputs"), once=True)
        self.recorder.__enter__()

    def remove(self) -> None:
        self.recorder.__exit__(None, None, None)


class Gained:
    """The part whose parameters scale every expert's output."""

    def __init__(self, model: Any) -> None:
        self.model = model
        attach(model, Gain())
        stir(model)

    def remove(self) -> None:
        detach(self.model, "experts")


class Dealt:
    """Experts dealt out to the ranks of a group of one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        expert_parallel(model, Ranks(dist.group.WORLD))

    def remove(self) -> None:
        gather_experts(self.model)


KINDS: tuple[Callable[[Any], Any], ...] = (Recorded, Gained, Dealt)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Formula:
    """Compares what every layer's experts give with the plain formula, one expert after the other."""

    def __init__(self, model: Any) -> None:
        self.layers = find_moe_layers(model)
        self.whole = {layer.index: copy.deepcopy(layer.experts) for layer in self.layers}
        self.gains: dict[int, Tensor] = {}
        self.chosen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for layer in self.layers:
            layer.experts.register_forward_hook(self.hook(layer.index))

    def hook(self, index: int) -> Callable[..., None]:
        def see(_: Any, args: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
            self.chosen[index] = hidden_NH, index_NK, weight_NK = args
            total_NH = torch.zeros_like(hidden_NH)
            for expert in range(EXPERTS):
                rows_N, place_N = (index_NK == expert).nonzero(as_tuple=True)
                one_NH = plain(self.whole[index], expert, hidden_NH[rows_N])
                if index in self.gains:
                    one_NH = one_NH * (1 + self.gains[index][expert])
                total_NH.index_add_(0, rows_N, one_NH * weight_NK[rows_N, place_N, None])
            torch.testing.assert_close(output, total_NH, atol=1e-5, rtol=1e-4)

        return see


ORDERS = list(itertools.permutations(range(len(KINDS))))


@pytest.mark.parametrize("coming", ORDERS)
@pytest.mark.parametrize("going", ORDERS)
@pytest.mark.usefixtures("group")
@torch.no_grad()
def test_whatever_comes_first_and_goes_first(coming: tuple[int, ...], going: tuple[int, ...]) -> None:
    model = build(FAMILY)
    stock, state = logits(model), copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    formula = Formula(model)
    there = {kind: KINDS[kind](model) for kind in coming}
    formula.gains = {i: on.learned["gain"].detach() for i, on in attached(model, "experts")[0].layers.items()}
    logits(model)
    trace = there[0].recorder.trace()
    for index, (_, index_NK, weight_NK) in formula.chosen.items():
        assert torch.equal(trace.indices(index), index_NK)
        torch.testing.assert_close(trace.weights(index), weight_NK, rtol=2e-3, atol=1e-5)
    for kind in going:
        there[kind].remove()
        if kind == 1:
            formula.gains = {}
        logits(model)
    assert leftovers(model) == []
    assert [type(module) for module in model.modules()] == classes
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), stock)


@torch.no_grad()
@pytest.mark.parametrize("once", [False, True])
def test_outputs_of_single_experts_are_those_with_the_part(once: bool) -> None:
    model = build("gpt_oss")
    formula = Formula(model)
    Gained(model)
    formula.gains = {i: on.learned["gain"].detach() for i, on in attached(model)[0].layers.items()}
    with Recorder(model, statistics=("output_norm",), once=once) as recorder:
        logits(model)
    statistics = recorder.trace().statistics
    assert statistics is not None
    for index, (hidden_NH, index_NK, _) in formula.chosen.items():
        expected_E = torch.zeros(EXPERTS, dtype=torch.float64)
        for expert in range(EXPERTS):
            one_NH = plain(formula.whole[index], expert, hidden_NH[(index_NK == expert).any(1)])
            expected_E[expert] = (one_NH * (1 + formula.gains[index][expert])).norm(dim=1).sum()
        torch.testing.assert_close(statistics[index]["output_norm"], expected_E, rtol=1e-4, atol=1e-5)


class Next(ExpertsPart):
    """Every token goes to the experts after those that it chose, one choice at a time."""

    reads_weights: ClassVar = False

    def compute(self, inputs: ExpertsInputs) -> Tensor:
        after_TK = (inputs.index_TK + 1) % inputs.geometry.experts
        places = range(after_TK.shape[1])
        run = inputs.run
        return torch.stack([run(inputs.hidden_TH, after_TK[:, [k]], inputs.weights_TK[:, [k]]) for k in places]).sum(0)

    def reference(self, inputs: ExpertsInputs) -> Tensor:
        return self.compute(inputs).float()  # it computes no expert itself


@torch.no_grad()
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])  # shared experts before and after the routed ones
def test_a_part_that_changes_choices_stands_over_experts_that_are_dealt_out(family: str) -> None:
    model, dealt = build(family), build(family)
    expert_parallel(dealt, Ranks(dist.group.WORLD))
    for one in (model, dealt):
        attach(one, Next())
    for seed in range(3):  # what one pass leaves must not reach the next
        ids = tokens(seed=seed)
        torch.testing.assert_close(logits(dealt, ids), logits(model, ids), atol=1e-5, rtol=1e-4)
    assert not any(shard.overlap is None or shard.overlap._results for shard in shards(dealt)), "nothing is kept"
    detach(dealt, "experts")
    detach(model, "experts")
    torch.testing.assert_close(logits(dealt), logits(model), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_families_that_do_not_ask_transformers_registry_have_parts_too() -> None:
    model = build("qwen3_moe")
    for layer in find_moe_layers(model):
        stock: Any = type(layer.experts)
        layer.experts.__class__ = type("OwnLoop", (stock,), {"forward": stock.forward.__wrapped__})
    formula = Formula(model)
    Gained(model)
    formula.gains = {i: on.learned["gain"].detach() for i, on in attached(model)[0].layers.items()}
    with Recorder(model, statistics=("outputs",), once=True):
        logits(model)
    assert len(formula.chosen) == len(formula.layers)


STATISTICS = ("basic", "outputs", "router", "inputs")


@pytest.mark.parametrize("with_part", [False, True])
@pytest.mark.parametrize(("outer_once", "inner_once"), list(itertools.product([False, True], repeat=2)))
def test_two_recorders_see_what_each_sees_alone(with_part: bool, outer_once: bool, inner_once: bool) -> None:
    """With a part attached experts are asked one by one through `run`; the other recorder must not hear of it."""
    model = build(FAMILY)
    if with_part:
        attach(model, Gain())
        stir(model)
    stock = logits(model)
    alone = Recorder(model, statistics=STATISTICS)
    inner = Recorder(model, statistics=STATISTICS, once=inner_once)
    outer = Recorder(model, statistics=(*STATISTICS, "all_output_sum"), once=outer_once)
    with alone:
        logits(model)
    with inner, outer:
        torch.testing.assert_close(logits(model), stock, atol=1e-5, rtol=1e-4)
    expected = alone.trace().statistics
    assert expected is not None
    for recorder in (inner, outer):
        found = recorder.trace().statistics
        assert found is not None
        for index, known in expected.items():
            for name, value in known.items():
                torch.testing.assert_close(found[index][name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("group")
def test_recording_once_leaves_the_overlap_on() -> None:
    """Tokens that left early for a pass whose experts were computed elsewhere are not taken for those of the next."""
    model = build(FAMILY)  # calls its shared experts first
    stock = logits(model)
    expert_parallel(model, Ranks(dist.group.WORLD))
    events: list[str] = []
    for shard, layer in zip(shards(model), find_moe_layers(model), strict=True):
        send = shard.dispatcher.dispatch
        shard.dispatcher.dispatch = lambda *given, _send=send: events.append("sent") or _send(*given)
        layer.shared[0].down_proj.register_forward_hook(lambda *_: events.append("shared"))
    layers = len(find_moe_layers(model))
    logits(model)
    assert events == ["sent", "shared"] * layers
    with Recorder(model, statistics=("outputs",), once=True):
        torch.testing.assert_close(logits(model), stock, atol=1e-5, rtol=1e-4)
    for _ in range(2):
        events.clear()
        torch.testing.assert_close(logits(model, tokens(2, 9)), logits(build(FAMILY), tokens(2, 9)))
        assert events == ["sent", "shared"] * layers
