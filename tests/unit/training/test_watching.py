"""Routing is looked at as each layer tells it; what does not fit falls out of figures, or is refused where needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.errors import BadData, UnsupportedModel
from moekit.trace.seam import see_choices
from moekit.training.batch import MicroBatch
from moekit.training.layers import TrainedLayer, trained_layers
from moekit.training.watching import RoutingWatch
from tests import families, odd_families
from tests.families import HIDDEN, tokens
from tests.unit.trace.test_odd_choices import nllb


def of_other_positions(ids: Tensor | None, mask: Tensor | None) -> MicroBatch:
    """A mask that covers other positions than the routers see."""
    return MicroBatch(ids, torch.ones(1, 3))


def watched(model: PreTrainedModel, seen: list[Any], *, strict: bool) -> RoutingWatch:
    return RoutingWatch(model, trained_layers(model), seen.append, of_other_positions, strict)


@pytest.mark.parametrize("model", [families.build("olmoe"), odd_families.build("dbrx")], ids=["logits", "choices"])
def test_a_layer_that_does_not_see_the_positions_of_the_text_falls_out_of_the_figures(model: PreTrainedModel) -> None:
    seen: list[Any] = []
    watch = watched(model.train(), seen, strict=False)
    model(input_ids=tokens(), use_cache=False).logits.sum().backward()
    assert watch.meter is not None
    assert watch.meter.read() is None
    note = watch.notes[-1]
    assert note.startswith("layers 0, 1: the attention mask covers 3 positions")
    assert note.endswith("left out of the routing figures")
    assert not seen
    watch.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_experts_that_do_not_run_what_is_chosen_are_left_out_of_the_figures() -> None:
    """Refused where something is decided on choices, they train like all others."""
    watch = RoutingWatch(nn.Linear(2, 2), [TrainedLayer(nllb()[1], "softmax", None)], print, MicroBatch, strict=False)
    assert watch.meter is None
    assert watch.notes == ["layer 0: nothing tells which experts run; left out of the routing figures"]
    watch.close()


def test_objectives_must_not_be_left_out() -> None:
    model = families.build("olmoe").train()
    watch = watched(model, [], strict=True)
    with pytest.raises(BadData, match="the attention mask covers 3 positions"):
        model(input_ids=tokens(), use_cache=False)
    watch.close()


def test_a_call_of_experts_that_shows_no_choices_is_told() -> None:
    layer = trained_layers(odd_families.build("dbrx"))[0].layer
    told: list[UnsupportedModel] = []
    handle = see_choices(layer, lambda *_: None, otherwise=told.append)
    with pytest.raises(TypeError):
        layer.experts(torch.zeros(2, HIDDEN))
    assert len(told) == 1
    handle.remove()
    handle = see_choices(layer, lambda *_: None)
    with pytest.raises(UnsupportedModel, match="is called with"):
        layer.experts(torch.zeros(2, HIDDEN))
    handle.remove()
