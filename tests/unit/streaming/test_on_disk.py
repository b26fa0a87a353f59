"""Recording and comparing checkpoints whose layers hand on more than one hidden state [B, S, H], layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.decoder import layers_of
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.weights import LayerWeights
from moekit.evaluation.changes import Variant
from moekit.evaluation.variants import compare_variants
from moekit.trace import record
from moekit.trace.streamed import Streamed, record_streamed
from tests.families import EXPERTS
from tests.unit.streaming.handing import batches, made

GROUPS = ("basic", "gates", "inputs", "outputs")


@dataclass(frozen=True)
class Document:
    ids: list[int]
    domain: str


DOCUMENTS = [Document(list(range(5, 23)), "a"), Document([9, 4, 77, 30, 2, 60], "b")]


def saved(name: str, folder: Path) -> tuple[Any, Checkpoint, list[dict[str, torch.Tensor]]]:
    model = made(name)
    model.save_pretrained(folder)
    text = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches(name, model)]
    return model, Checkpoint.open(folder), text


def same(first: Any, second: Any) -> None:
    left, right = first.tensors(), second.tensors()
    assert left.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["deepseek_v4", "glm_moe_dsa", "hy_v4", "qwen4_exp", "switch_transformers"])
def test_streamed_is_recorded_whole(name: str, tmp_path: Path) -> None:
    model, checkpoint, text = saved(name, tmp_path / "m")
    streamed = record_streamed(checkpoint, text, statistics=GROUPS, keep_choices=True)
    same(streamed, record(model, text, statistics=GROUPS, keep_choices=True))
    same(record_streamed(checkpoint, text, statistics=GROUPS, keep_choices=True, limit=0), streamed)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["glm_moe_dsa", "gemma4", "switch_transformers"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_an_interrupted_run_goes_on_where_it_was_or_begins_anew(
    name: str, layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, checkpoint, text = saved(name, tmp_path / "m")
    expected = record_streamed(checkpoint, text, statistics=GROUPS)
    own, ran = Streamed._layer, []

    def dies(self: Streamed, index: int, *given: Any) -> None:
        own(self, index, *given)
        if index == layer:
            raise _Killed

    monkeypatch.setattr(Streamed, "_layer", dies)
    with pytest.raises(_Killed):
        record_streamed(checkpoint, text, statistics=GROUPS, folder=tmp_path / "scratch")

    def counts(self: Streamed, index: int, *given: Any) -> None:
        ran.append(index)
        own(self, index, *given)

    monkeypatch.setattr(Streamed, "_layer", counts)
    same(record_streamed(checkpoint, text, statistics=GROUPS, folder=tmp_path / "scratch"), expected)
    # An encoder's last answer is all that its decoder needs; within the decoder it is not.
    assert ran == list(range(0 if name == "gemma4" else layer, len(layers_of(model))))


def doubled(layers: Sequence[int]) -> Variant:
    def rewrite(layer: int, weights: LayerWeights) -> LayerWeights:
        return weights.map(lambda tensor: tensor * 2, router=False)

    outcome = LayerOutcome(keep=tuple(range(EXPERTS)))
    return Variant(f"doubled from {layers[0]}", dict.fromkeys(layers, outcome), rewrite)


def reads(model: Any) -> bool:
    """Whether a model reads before it writes; its decoder begins with padding (0)."""
    return bool(model.config.is_encoder_decoder)


def likelihoods(model: Any) -> list[float]:
    found = []
    for document in DOCUMENTS:
        ids = torch.tensor([document.ids])
        with torch.no_grad():
            forced = {"decoder_input_ids": torch.tensor([[0, *document.ids[1:-1]]])} if reads(model) else {}
            logits = model(input_ids=ids[:, :-1], **forced).logits[0].double()
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
    return found


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("name", ["gemma4", "glm_moe_dsa", "hy_v4", "qwen4_exp", "switch_transformers"])
def test_each_variant_goes_on_with_what_its_own_layers_hand_on(name: str, limit: int, tmp_path: Path) -> None:
    model, checkpoint, _ = saved(name, tmp_path / "m")
    places = [moe.index for moe in find_moe_layers(model)]
    asked = [places, places[-1:]]
    found = compare_variants(
        checkpoint, DOCUMENTS, [doubled(layers) for layers in asked], window=24, batch_tokens=24, limit=limit
    )
    assert found[0].nll == pytest.approx(likelihoods(model), abs=1e-4)
    for layers, result in zip(asked, found[1], strict=True):
        changed = copy.deepcopy(model)
        for moe in find_moe_layers(changed):
            if moe.index in layers:
                for parameter in moe.experts.parameters():
                    parameter.data *= 2
        assert result.perplexity.nll == pytest.approx(likelihoods(changed), abs=1e-4)
        assert result.perplexity.nll != pytest.approx(found[0].nll, abs=1e-2)
