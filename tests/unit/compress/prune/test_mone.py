"""MoNE: scores and constants by hand, however the text is cut; and what constants in the place of experts give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import moekit
from moekit.anatomy import find_moe_layers
from moekit.anatomy.probe import Geometry
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.apply import apply
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.rewriting import novices_of
from moekit.compress.prune.mone import MoNE, errors_left, mean_rows, spread_of_outputs
from moekit.errors import BadConfig
from moekit.jobs.prune import prune
from moekit.trace import record
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import record_streamed
from moekit.trace.vocabulary import resolve
from tests.checkpoints import plain
from tests.families import build, logits, tokens
from tests.tiny import write_model, write_text

SUMS = MoNE().required
TEXT = [tokens(4, 24, seed=21), tokens(2, 9, seed=22)]


def seen() -> TokenBatch:
    """Four tokens; expert A (0) answers three with gates .8, .2, .5, B (1) three with .2, .5, .4; nobody chose 2."""
    none = [0.0, 0.0]
    return TokenBatch(
        3,
        torch.tensor([[0, 1], [0, 1], [0, 3], [3, 1]]),
        weights=torch.tensor([[0.8, 0.2], [0.2, 0.5], [0.5, 0.0], [0.0, 0.4]]),
        outputs=torch.tensor([[[2.0, 0], [1, 1]], [[0, 4.0], [3, -1]], [[2.0, 2], none], [none, [1.0, 0]]]),
    )


def inputs(*batches: TokenBatch) -> LayerInputs:
    statistics = LayerStatistics.empty(resolve(SUMS), 3, 2)
    for batch in batches:
        statistics.update(batch)
    return LayerInputs(0, Geometry(2, 3, 2, 4, 0, True, False, False, True), statistics)


def test_the_worked_example() -> None:
    own = inputs(seen())
    statistics = own.statistics
    spread_E = spread_of_outputs(statistics.load_E, statistics["output_sum"], statistics["output_channel_square"])
    assert spread_E[0].item() == pytest.approx(2.309401, abs=1e-6)
    assert spread_E[2].item() == 0
    assert MoNE(frequency="given-selection").score(own)[0].item() == pytest.approx(1.154701, abs=1e-6)
    assert MoNE().score(own)[0].item() == pytest.approx(0.866025, abs=1e-6)
    constants = {name: MoNE(operator=name).constants(own) for name in ("zero", "mean", "g2")}
    assert constants["mean"].tolist() == [pytest.approx([4 / 3, 2]), pytest.approx([5 / 3, 0]), [0, 0]]
    assert constants["g2"][0].tolist() == pytest.approx([1.913978, 0.709677], abs=1e-6)
    sums = ("gate_square", "square_gated_output_sum", "gated_output_square")
    left = {name: errors_left(c, *(statistics[s] for s in sums)) for name, c in constants.items()}
    assert [left[name][0].item() for name in ("zero", "mean", "g2")] == pytest.approx([5.2, 3.186667, 1.324731])
    assert left["g2"][2].item() == 0


def test_tokens_in_one_batch_or_in_many_give_the_same() -> None:
    generator = torch.Generator().manual_seed(3)
    # Far from zero, where sums of squares lose most.
    outputs = 30 + torch.randn(60, 2, 2, generator=generator)
    index = torch.rand(60, 3, generator=generator).topk(2).indices
    weights = torch.rand(60, 2, generator=generator)
    whole = TokenBatch(3, index, weights=weights, outputs=outputs)
    cut = [whole.rows(slice(start, start + 7)) for start in range(0, 60, 7)]
    one, many = inputs(whole), inputs(*cut)
    torch.testing.assert_close(MoNE().score(one), MoNE().score(many), rtol=1e-6, atol=0)
    torch.testing.assert_close(MoNE().constants(one), MoNE().constants(many), rtol=1e-6, atol=0)
    rows_nH = outputs[index == 1].double()
    assert MoNE(frequency="given-selection").score(one)[1].item() == pytest.approx(
        rows_nH.std(0).norm().item() * weights[index == 1].double().mean().item(), rel=1e-6
    )
    torch.testing.assert_close(mean_rows(one.statistics["output_sum"], one.statistics.load_E)[1], rows_nH.mean(0))


def test_outputs_that_grow_by_a_factor_take_mean_and_spread_along() -> None:
    model = build("qwen3_moe")
    larger = copy.deepcopy(model)
    last = find_moe_layers(larger)[-1]
    with torch.no_grad():
        last.experts.down_proj[2] *= 3
    traces = [record(m, [tokens(4, 16)], statistics=SUMS) for m in (model, larger)]
    found = [LayerInputs(last.index, last.geometry, trace.require(SUMS)[last.index]) for trace in traces]
    (score, constant), (more, further) = ((MoNE().score(i), MoNE().constants(i)) for i in found)
    factor_E = torch.ones(8, dtype=torch.float64).index_fill(0, torch.tensor([2]), 3.0)
    torch.testing.assert_close(more, score * factor_E, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(further, constant * factor_E[:, None], rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_the_error_told_is_what_the_layer_loses_where_one_expert_goes() -> None:
    model, ids = build("olmoe"), tokens(4, 16)
    first = find_moe_layers(model)[0]
    statistics = record(model, [ids], statistics=SUMS).require(SUMS)[first.index]
    own = LayerInputs(first.index, first.geometry, statistics)
    before = outputs(model, ids)
    for operator in ("zero", "mean", "g2"):
        method = MoNE(operator=operator)
        outcome = method.decide(own, method.score(own), 7)
        constants = {} if operator == "zero" else {first.index: method.constants(own)}
        every = LayerOutcome(keep=tuple(range(8)), redirect=tuple(range(8)))
        changed = change_model(copy.deepcopy(model), {0: outcome, 1: every}, novices=constants)
        gone = (outcome.redirect or ()).index(None)
        sums = [statistics[name] for name in ("gate_square", "square_gated_output_sum", "gated_output_square")]
        told = errors_left(method.constants(own), *sums)[gone].item()
        assert (outputs(changed, ids) - before).square().sum().item() == pytest.approx(told, rel=1e-4), operator


def outputs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the first block gives."""
    found: list[Tensor] = []
    hook = find_moe_layers(model)[0].block.register_forward_hook(lambda *seen: found.append(seen[2]))
    model(ids)
    hook.remove()
    return found[0].double()


def made(source: Path, folder: Path, keep: int, text: list[Tensor] = TEXT, **knobs: Any) -> WeightPlan:
    """Plan and write without a job around it."""
    checkpoint, method = Checkpoint.open(source), MoNE(**knobs)
    trace = record_streamed(checkpoint, text, statistics=("load", *method.required))
    plan = plan_weights(checkpoint, trace, PlanRequest(method, Budget(keep=keep)))
    apply(checkpoint, plan.outcomes, folder, novices=novices_of(plan, checkpoint), record=Record(command="a test"))
    return plan


def opened(folder: Path) -> Tensor:
    return logits(moekit.load(folder, dtype=torch.float32, device="cpu").eval())


def held(folder: Path) -> dict[str, Tensor]:
    """The tensors of all shards."""
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def test_experts_that_answer_one_thing_are_replaced_without_a_trace(tmp_path: Path) -> None:
    model = build("gpt_oss")
    with torch.no_grad():
        for layer in find_moe_layers(model):
            layer.experts.down_proj.zero_()
            layer.experts.down_proj_bias.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "m")
    before = opened(tmp_path / "m")
    plan = made(tmp_path / "m", tmp_path / "out", 5)
    # An expert that no token of the text chose would have nothing to remember.
    assert all(not told.never_routed for told in plan.file.layers.values())
    assert (opened(tmp_path / "out") - before).abs().max() < 1e-6


def test_zero_novices_are_down_projections_of_zero(tmp_path: Path) -> None:
    plan = made(plain(tmp_path / "m", "olmoe"), tmp_path / "out", 4, operator="zero")
    model = build("olmoe")
    for layer in find_moe_layers(model):
        outcome = plan.outcomes[layer.index]
        with torch.no_grad():
            layer.experts.down_proj[[e for e in range(8) if e not in outcome.keep]] = 0
        assert outcome.figures["novice_error"] == pytest.approx(1)
    torch.testing.assert_close(opened(tmp_path / "out"), logits(model), rtol=1e-5, atol=1e-6)


def test_what_stays_is_the_sources_bit_for_bit(tmp_path: Path) -> None:
    source = plain(tmp_path / "m", "qwen3_moe")
    made(source, tmp_path / "all", 8)
    assert torch.equal(opened(tmp_path / "all"), opened(source))
    plan = made(source, tmp_path / "out", 5, operator="g2")
    old, new = held(source), held(tmp_path / "out")
    for layer, outcome in plan.outcomes.items():
        place = f"model.layers.{layer}.mlp."
        for position, expert in enumerate(outcome.keep):
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"{place}experts.{{}}.{part}.weight".format
                assert torch.equal(new[name(position)], old[name(expert)])
        assert torch.equal(new[f"{place}gate.weight"], old[f"{place}gate.weight"][list(outcome.keep)])
        assert 0 < outcome.figures["novice_gates"] < 1
        assert 0 < outcome.figures["novice_error"] < 1


def test_experts_that_nothing_is_known_of_are_named_and_answer_zero(tmp_path: Path) -> None:
    plan = made(plain(tmp_path / "m", "olmoe"), tmp_path / "out", 2, [tokens(1, 2)])
    unseen = plan.file.layers[0].never_routed
    assert unseen
    said = f"experts {', '.join(map(str, unseen))} become novices that answer zero"
    assert any(line.startswith("layer 0: ") and line.endswith(said) for line in plan.file.warnings)
    tensors = load_file(tmp_path / "out" / "moekit.safetensors")
    numbers, constants_PH = tensors["constants.0.0.nobody"].tolist(), tensors["constants.1.0.novices"]
    assert all((constants_PH[numbers.index(expert)] == 0).all() for expert in unseen)


def test_the_proof_measures_the_folder_that_is_written(tmp_path: Path) -> None:
    source, text = write_model(tmp_path / "m"), write_text(tmp_path / "text", documents=2, repeats=2)
    with pytest.raises(BadConfig, match="experts that are gone"):
        prune(source, method="mone", keep=5, data=text, proof=False, stock_only=True, out=tmp_path / "no")
    result = prune(source, method="mone", keep=5, data=text, heldout=text, out=tmp_path / "out")
    assert result.proof is not None
    assert result.check is not None
    assert result.check["ok"]
    own = moekit.evaluate(tmp_path / "out", data=text, device="cpu", dtype="float32")
    measured = result.proof["method"]["text"]["overall"]["b"]["perplexity"]
    assert measured == pytest.approx(own.domains[0]["perplexity"], rel=1e-5)


def test_another_methods_scores_may_say_who_stays() -> None:
    reap = MoNE(scorer="reap")
    assert set(reap.required) == {*SUMS, "renormalised_output_norm"}
    statistics = LayerStatistics.empty(resolve(reap.required), 3, 2)
    statistics.update(seen())
    own = LayerInputs(0, Geometry(2, 3, 2, 4, 0, True, False, False, True), statistics)
    # Gates of A over the sums of their tokens' gates, times the norms of its outputs, by hand.
    assert reap.score(own)[0].item() == pytest.approx((0.8 * 2 + 0.2 / 0.7 * 4 + 8**0.5) / 3)
    with pytest.raises(BadConfig, match="does not rank"):
        MoNE(scorer="naee")
    with pytest.raises(BadConfig, match="reap"):
        MoNE(scorer="raep")


def test_a_dropped_router_row_needs_no_policy() -> None:
    assert not MoNE(operator="drop").redirects
    assert set(MoNE(operator="drop").required) < set(SUMS)
    outcome = MoNE(operator="drop").decide(inputs(seen()), torch.tensor([3.0, 2.0, 1.0]), 2)
    assert (outcome.keep, outcome.redirect) == ((0, 1), None)
    assert MoNE().decide(inputs(seen()), torch.tensor([3.0, 2.0, 1.0]), 2).redirect == (0, 1, None)
