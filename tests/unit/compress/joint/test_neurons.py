"""What is seen of neurons while the text passes, against the plain formula and autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moekit
from moekit.anatomy.probe import find_moe_layers
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.resize import read_block
from moekit.compress.joint.gradients import block_gradients
from moekit.compress.joint.neurons import NeuronStore, see_neurons
from moekit.compress.slim.slimmoe import SlimMoE
from moekit.data import Document
from moekit.errors import UnsupportedModel
from moekit.jobs.shared.inputs import calibration_rows
from moekit.jobs.shared.opened import open_source
from moekit.trace.streamed import Streamed
from tests.tiny import SENTENCES, write_model

LAYER = 1


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = open_source(str(write_model(tmp_path_factory.mktemp("made") / "moe", "qwen3_moe", num_hidden_layers=2)))
    documents = [Document(text, domain, n) for n, (domain, text) in enumerate(SENTENCES.items())]
    batches = list(calibration_rows(documents, source.tokenizer(), seq_len=40, max_tokens=80).batches(2))
    model = moekit.load(source.location, device="cpu").eval().requires_grad_(False)
    store = NeuronStore()
    with Streamed(source.checkpoint, batches, statistics=("load",), device="cpu") as streamed:
        streamed.run()
        gradients = block_gradients(model, streamed.walk.batches, seed=0)
        see_neurons(streamed, SlimMoE(score="fisher"), store, [LAYER], gradients=gradients)
        inputs = LayerInputs(LAYER, source.geometries[LAYER], streamed.records[LAYER].statistics)
        with pytest.raises(UnsupportedModel, match="looks at gradients"):
            see_neurons(streamed, SlimMoE(score="fisher"), NeuronStore(), [LAYER])
        kept = list(streamed.walk.batches)
    return store, inputs, model, kept, gradients


def test_moments_and_scores_are_those_of_the_plain_formula(seen: Any) -> None:
    store, _, model, batches, gradients = seen
    moe = find_moe_layers(model)[LAYER]
    weights = read_block(moe, model.config)
    given: list[torch.Tensor] = []
    handle = moe.block.register_forward_hook(lambda _m, args, _o: given.append(args[0].reshape(-1, 32)))
    experts, width = moe.geometry.experts, moe.geometry.width
    moments = torch.zeros(experts, width, width, dtype=torch.float64)
    fisher = torch.zeros(experts, width, dtype=torch.float64)
    for number, batch in enumerate(batches):
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        mask_T = batch.attention_mask.bool().flatten()
        slopes_NH = gradients.get(LAYER, number).flatten(0, 1)[mask_T].double()
        for x_H, g_H in zip(given[-1][mask_T].double(), slopes_NH, strict=True):
            top, index = (weights.router_EH.double() @ x_H).softmax(-1).topk(2)
            for w, e in zip((top / top.sum()).tolist(), index.tolist(), strict=True):
                gate = torch.nn.functional.silu(weights.gate_EIH[e].double() @ x_H)
                h_I = gate * (weights.up_EIH[e].double() @ x_H)
                moments[e] += torch.outer(w * h_I, w * h_I)
                # The loss to first order, as each neuron is scaled.
                scale_I = torch.ones(width, dtype=torch.float64, requires_grad=True)
                loss = w * g_H @ (weights.down_EHI[e].double() @ (h_I * scale_I))
                fisher[e] += torch.autograd.grad(loss, scale_I)[0].square()
    handle.remove()
    found = torch.stack([store.moment(LAYER, e) for e in range(experts)]).double()
    assert torch.allclose(found, moments, rtol=1e-4, atol=1e-6 * float(moments.abs().max()))
    assert torch.allclose(store.scores(LAYER)["neuron_fisher"], fisher, rtol=1e-3, atol=1e-6 * float(fisher.max()))


def test_experts_that_stay_have_the_rows_of_those_that_they_stand_on(seen: Any) -> None:
    store, inputs = seen[0], seen[1]
    some = store.standing(inputs, (3, 1))
    assert some.experts == 2
    assert torch.equal(some.statistics["neuron_fisher"], store.scores(LAYER)["neuron_fisher"][[3, 1]])
    assert torch.equal(some.statistics["load"], inputs.statistics["load"][[3, 1]])
    assert torch.equal(some.gated_moment(0), store.moment(LAYER, 3))


def test_a_folder_keeps_what_was_seen(tmp_path: Path) -> None:
    first = NeuronStore(tmp_path)
    first.put(4, {"neuron_fisher": torch.ones(1, 2)}, [torch.eye(2)])
    again = NeuronStore(tmp_path)
    assert 4 in again
    assert 5 not in again
    assert torch.equal(again.moment(4, 0), torch.eye(2))
