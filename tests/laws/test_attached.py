"""Attaching changes nothing until something is learned; detaching gives the stock model back, bit for bit."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from transformers import PreTrainedModel

from moekit.anatomy import MoELayer, find_moe_layers, identify_gate
from moekit.catalogue import MethodRecord
from moekit.errors import BadConfig, UnsupportedModel
from moekit.routing import TopK
from moekit.runtime import attach, attached, detach, parts_on, without_parts
from moekit.runtime.experts import ExpertsInputs, TransientPart, refuse_other_calls
from moekit.runtime.hanging import lay
from moekit.runtime.part import RuntimePart
from tests.families import build, logits
from tests.parts import NEUTRAL, FirstOnly, Gain, Momentum, Nudge, NullExperts, learned, leftovers, pairs, stir
from tests.runtime_cases import cases, hang

KINDS = ("routing", "block", "experts")


@pytest.mark.parametrize(("part", "family"), pairs(NEUTRAL))
def test_the_neutral_setting_is_bit_equal(part: RuntimePart, family: str) -> None:
    model = build(family)
    stock = logits(model)
    attach(model, part)
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize(("record", "family"), cases(KINDS))
def test_detaching_gives_the_stock_model_back(record: MethodRecord, family: str) -> None:
    model = build(family)
    stock, classes = logits(model), [type(module) for module in model.modules()]
    state, hooks = set(model.state_dict()), [len(m._forward_pre_hooks) for m in model.modules()]
    implementation, ignored = model.get_experts_implementation(), model._keys_to_ignore_on_save
    part = hang(model, family, record).part
    stir(model)
    changed = logits(model)
    assert "learnable" not in record.traits or not torch.equal(changed, stock)
    assert torch.equal(changed, logits(model)), "two forwards are equal: state does not leak"
    assert torch.equal(logits(copy.deepcopy(model)), changed)
    with without_parts(model):
        assert torch.equal(logits(model), stock)
    assert torch.equal(logits(model), changed)
    (taken,) = detach(model)
    assert taken.part == part
    assert attached(model) == []
    assert torch.equal(logits(model), stock)
    assert [type(module) for module in model.modules()] == classes
    assert set(model.state_dict()) == state
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.get_experts_implementation() == implementation
    assert model._keys_to_ignore_on_save == ignored


def test_some_layers_only() -> None:
    model = build("qwen3_moe")
    attach(model, Nudge(), layers=[1])
    assert [bool(parts_on(layer.router)) for layer in find_moe_layers(model)] == [False, True]
    assert list(learned(model)) == ["model.layers.1.mlp.gate.moekit_parts.Nudge.learned.delta"]
    with pytest.raises(BadConfig, match="no MoE layer") as refused:
        attach(model, FirstOnly(), layers=[0, 7])
    assert refused.value.layer == 7


def test_what_does_not_fit_is_refused_and_leaves_the_model_alone() -> None:
    model = build("qwen3_moe")
    stock = logits(model)
    attach(model, TopK())
    for part, message in ((TopK(), "attached here already"), (NullExperts(), "one part at most can")):
        with pytest.raises(BadConfig, match=message):
            attach(model, part)
    for constants, message in (
        ({0: {"delta": torch.zeros(7)}, 1: {}}, r"shape \[7\], not \[8\]"),
        ({0: {"what": torch.zeros(8)}, 1: {}}, "nothing says what the axes"),
    ):
        with pytest.raises(BadConfig, match=message) as refused:
            attach(model, Nudge(), constants)
        assert refused.value.layer == 0
    assert [type(a.part) for a in attached(model)] == [TopK]
    assert torch.equal(logits(model), stock)


def test_experts_parts_stay_whatever_implementation_transformers_is_told_to_use() -> None:
    model = build("qwen3_moe")
    attach(model, Gain(), layers=[0])
    stir(model)
    changed = logits(model)
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(logits(model), changed, atol=1e-5, rtol=1e-4)
    detach(model)
    assert model.config._experts_implementation == "batched_mm"


def test_what_another_library_set_as_forward_still_runs_inside_and_comes_back() -> None:
    """It may do anything, with or without the stock forward."""
    model = build("qwen3_moe")
    experts = find_moe_layers(model)[0].experts
    calls, stock = [], experts.forward
    own = experts.forward = lambda *args: calls.append(len(args[0])) or stock(*args)  # type: ignore[assignment]
    before = logits(model)
    attach(model, Gain())
    stir(model)
    assert not torch.equal(logits(model), before)
    detach(model)
    assert experts.forward is own
    assert torch.equal(logits(model), before)
    assert len(calls) > 2


class Turned(TransientPart):
    """Gives the experts' answer column by column in memory, as a matrix product of turned factors does."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer, self.geometry = layer.index, layer.geometry

    def compute(self, inputs: ExpertsInputs) -> torch.Tensor:
        return inputs.run(inputs.hidden_TH, inputs.index_TK, inputs.weights_TK).T.contiguous().T


def test_experts_may_be_given_sequences_whatever_lies_in_memory() -> None:
    layer = find_moe_layers(build("qwen3_moe"))[0]
    hidden, index, weights = torch.randn(2, 3, 32), torch.randint(8, (6, 2)), torch.rand(6, 2)
    stock = layer.experts(hidden.flatten(0, 1), index, weights).view_as(hidden)
    lay(layer, Turned(layer))
    assert torch.equal(layer.experts(hidden, index, weights), stock)


def test_experts_that_are_called_in_another_way_are_refused() -> None:
    class Dense(torch.nn.Module):
        def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
            return hidden_TH

    model = build("qwen3_moe")
    layer = find_moe_layers(model)[1]
    attach(model, Gain())
    for take_off in (lambda: detach(model), lambda: None):
        with pytest.raises(UnsupportedModel, match=r"top_k_weights \[3, 8\], not with") as refused:
            layer.experts(torch.zeros(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 8))
        assert refused.value.layer == 1
        assert "take them off" in str(refused.value.hint)
        lay(layer, Turned(layer))
        take_off()
    with pytest.raises(UnsupportedModel, match="called with hidden_TH, not with"):
        refuse_other_calls(Dense(), 0)


def dispatched() -> PreTrainedModel:
    """A model as accelerate leaves it where it lies on several devices: every module has a `forward` of its own."""
    model = build("qwen3_moe")
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def own_forwards(model: PreTrainedModel) -> list[tuple[object, object]]:
    return [(m.__dict__.get("forward"), m.__dict__.get("_old_forward")) for m in model.modules()]


@pytest.mark.parametrize("part", [Nudge(), FirstOnly(above=0.6), NullExperts(), Momentum(), Gain()], ids=repr)
def test_parts_act_in_a_model_that_accelerate_has_dispatched(part: RuntimePart) -> None:
    plain, model = build("qwen3_moe"), dispatched()
    stock, before = logits(model), own_forwards(model)
    for each in (plain, model):
        attach(each, part)
        stir(each)
    assert not torch.equal(logits(plain), stock)
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(copy.deepcopy(model)), logits(plain))
    detach(model)
    assert own_forwards(model) == before
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("part", [Nudge(), Momentum(), Gain()], ids=repr)
def test_accelerate_may_come_and_go_while_parts_are_attached(part: RuntimePart) -> None:
    model = build("qwen3_moe")
    stock = logits(model)
    attach(model, part)
    stir(model)
    changed = logits(model)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(logits(model), changed)
    with without_parts(model):
        assert torch.equal(logits(model), stock)
    assert torch.equal(logits(model), changed)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), changed)
    detach(model)
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("slot", ["router", "block"])
def test_a_router_or_block_that_another_library_runs_in_its_own_way_is_refused(slot: str) -> None:
    model = build("qwen3_moe")
    stock = logits(model)
    layer = find_moe_layers(model)[1]
    module = layer.require_router() if slot == "router" else layer.block
    own = type(module).forward
    theirs = module.forward = lambda *args, **kwargs: own(module, *args, **kwargs)
    with pytest.raises(UnsupportedModel, match="a forward of its own") as refused:
        attach(model, Nudge() if slot == "router" else Momentum())
    assert refused.value.layer == 1
    assert attached(model) == []
    assert module.forward is theirs
    del module.forward
    assert leftovers(model) == []
    assert torch.equal(logits(model), stock)


class Uncopied:
    """What must not be copied: somebody's hook, or a module far from the router."""

    def __call__(self, *args: object) -> None:
        """As a hook does nothing."""

    def __deepcopy__(self, memo: object) -> Uncopied:
        raise AssertionError("the router's copy took it along")


@pytest.mark.parametrize("dispatch", [False, True])
def test_asking_a_router_for_its_gate_copies_neither_its_parts_nor_its_hooks(dispatch: bool) -> None:
    """A router that another library wraps is asked each time, through a copy; parts know the whole model."""
    model = dispatched() if dispatch else build("qwen3_moe")
    layer = find_moe_layers(model)[0]
    router = layer.require_router()
    stock = identify_gate(layer)
    attach(model, Nudge())
    router.register_forward_hook(Uncopied())
    router.register_forward_pre_hook(Uncopied())
    model.model.layers[0].self_attn.note = Uncopied()
    router.note = 1 if dispatch else torch.nn.Parameter(torch.zeros(3))  # another router than those known
    assert identify_gate(layer) == stock
    attach(model, FirstOnly(), layers=[0])
    assert [type(part) for part in parts_on(router)] == [Nudge, FirstOnly]
