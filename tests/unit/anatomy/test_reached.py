"""Of several MoE blocks in one layer, the one that text runs through is found by asking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from moekit.anatomy import find_moe_layers
from moekit.anatomy.reached import holder_of, reached_by_text
from moekit.checkpoint.skeleton import empty_model
from moekit.compress.engine.droppable import check_droppable
from moekit.errors import UnsupportedModel
from moekit.family import build, family
from moekit.runtime import attach, detach
from moekit.trace import record
from tests.parts import Nudge

HIDDEN = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, 2), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts(hidden) * self.gate(hidden)[..., :1]  # type: ignore[no-any-return]


class Holder(nn.Module):
    """Runs one of two blocks, both, or none that it is not told of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.text, self.vision = kind, Block(), Block()

    def forward(self, hidden: Tensor, pictures: Any = None) -> Any:
        if self.kind == "needs more":
            return self.vision(hidden + pictures)
        made = self.text(hidden)
        return made + self.vision(hidden) if self.kind == "both" or pictures is not None else (made.flatten(), None)


EXPERTS = {"text.experts": HIDDEN, "vision.experts": HIDDEN}


@pytest.mark.parametrize(
    ("kind", "called"),
    [("one", {"text.experts"}), ("both", {"text.experts", "vision.experts"}), ("needs more", None)],
)
def test_what_is_called_with_hidden_states_alone(kind: str, called: set[str] | None) -> None:
    assert reached_by_text(Holder(kind), EXPERTS) == called


def test_asking_leaves_the_module_as_it_was() -> None:
    holder = Holder("one")
    seen: list[str] = []
    for name, module in holder.named_modules():
        module.register_forward_hook(lambda *a, name=name: seen.append(name))
        module.register_forward_pre_hook(lambda *a, name=name: seen.append(name))
    before = {name: tensor.clone() for name, tensor in holder.state_dict().items()}
    assert reached_by_text(holder, EXPERTS) == {"text.experts"}
    assert not seen
    assert holder.training
    assert all(torch.equal(before[name], tensor) for name, tensor in holder.state_dict().items())
    assert "forward" not in holder.text.experts.__dict__


@pytest.mark.parametrize(
    ("names", "holder"),
    [
        (["model.layers.1.mlp.text", "model.layers.1.mlp.vision"], "model.layers.1.mlp"),
        (["model.layers.1.text", "model.layers.1.vision"], "model.layers.1"),
        (["mlp.text", "mlp.vision"], "mlp"),
        (["text", "vision"], None),
        (["model.vision.layers.0.mlp", "model.text.layers.0.mlp"], None),
    ],
)
def test_what_holds_both_lies_within_a_layer(names: list[str], holder: str | None) -> None:
    assert holder_of(names) == holder


@pytest.fixture(scope="module")
def ernie() -> Any:
    return build(family("ernie4_5_vl_moe"))


def test_text_runs_through_the_text_block(ernie: Any) -> None:
    assert {type(ernie).__name__} == {"Ernie4_5_VLMoeForConditionalGeneration"}
    for model in (ernie, empty_model(ernie.config)):
        layers = find_moe_layers(model)
        assert [layer.index for layer in layers] == [1, 2, 3]
        assert all(layer.experts_name.endswith("mlp.text_moe.experts") for layer in layers)


def test_what_is_recorded_is_what_the_text_router_chose(ernie: Any) -> None:
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    block = ernie.model.language_model.layers[2].mlp.text_moe
    given: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: given.append(args[0].reshape(-1, args[0].shape[-1])))
    trace = record(ernie, [ids], statistics=("load", "block_output_norm"))
    handle.remove()
    [hidden_TH] = given
    scores_TE = (hidden_TH @ block.gate.weight.T).softmax(-1) + block.gate.moe_statics.e_score_correction_bias
    expected_TK = scores_TE.topk(2).indices
    assert torch.equal(trace.indices(2).sort(-1).values, expected_TK.sort(-1).values)


def test_it_is_still_found_once_parts_hang_on_it(ernie: Any) -> None:
    attach(ernie, Nudge())
    try:
        assert all(layer.name.endswith("text_moe") for layer in find_moe_layers(ernie))
    finally:
        detach(ernie)


def test_dropping_is_refused_for_what_counts_the_same_experts(ernie: Any) -> None:
    layers = find_moe_layers(ernie)
    with pytest.raises(UnsupportedModel, match=r"vision_moe.* counts experts, too, by the number"):
        check_droppable(ernie.config, layers, {1, 2, 3})


def test_two_blocks_that_both_see_text_are_refused(ernie: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(ernie.model.language_model.layers[1].mlp)

    def both(self: Any, hidden: Tensor, types: Any = None) -> Any:
        return self.text_moe(hidden)[0].view_as(hidden) + self.vision_moe(hidden)[0].view_as(hidden), None

    monkeypatch.setattr(kind, "forward", both)
    with pytest.raises(UnsupportedModel, match=r"layer 1: .*two MoE blocks, .*text_moe and .*vision_moe"):
        find_moe_layers(ernie)


def test_a_model_that_fills_a_second_text_is_refused() -> None:
    model = build(family("diffusion_gemma"))
    with pytest.raises(UnsupportedModel, match=r"fills a second one at once \(decoder_input_ids\)"):
        find_moe_layers(model)
    assert isinstance(model, transformers.DiffusionGemmaForBlockDiffusion)
