"""The pass that makes a checkpoint sparse, against references that run the whole model again for every layer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedModel

import moekit
from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.budget.parents import expert_weights, find_original
from moekit.compress.budget.sparsity import SparsityBudget
from moekit.compress.engine.apply import apply
from moekit.compress.engine.live import change_model
from moekit.compress.engine.measuring import refuse_damaged
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.resize import read_block
from moekit.compress.engine.rewriting import rewriter
from moekit.compress.engine.zeroing import SparsifyMethod
from moekit.compress.sparsify.magnitude import Magnitude
from moekit.compress.sparsify.owl import OWL, owl_sparsities
from moekit.compress.sparsify.wanda import Wanda
from moekit.errors import BadConfig, BadData, NumericFault
from moekit.trace import record
from moekit.trace.streamed import Streamed
from tests.checkpoints import edit_shard, plain
from tests.families import EXPERTS, HIDDEN, WIDTH, build, logits, tokens

IDS = tokens(3, 20, seed=5)
MASK = torch.ones_like(IDS)
MASK[2, 11:] = 0
BATCHES: list[Any] = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": tokens(2, 9, seed=6)}]
TEXT = CalibrationText(BATCHES)
NEEDS = ("load", "input_square", "inner_square")


def opened(folder: Path, family: str = "mixtral", **overrides: Any) -> Checkpoint:
    return Checkpoint.open(plain(folder, family, **overrides))


def zero_smallest(matrix_RC: Tensor, norms_C: Tensor, share: float) -> None:
    """Wanda by its definition, in place: in each row the floor(share C) smallest |W| norm become zero."""
    count = int(share * matrix_RC.shape[1] + 1e-9)
    for row_C in matrix_RC:
        order = (row_C.double().abs() * norms_C).argsort(stable=True)
        row_C[order[:count]] = 0


@torch.no_grad()
def sparse_by_hand(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """Layer by layer: run the whole model, look at what reaches each expert of this layer, zero, go on."""
    for layer in model.model.layers:
        experts, seen = layer.mlp.experts, []
        hook = experts.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args))
        for batch in BATCHES:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
            hidden, index, weights = seen.pop()
            keep = mask.flatten().bool()
            seen.insert(0, (hidden.reshape(-1, HIDDEN)[keep], index[keep], weights[keep]))
        hook.remove()
        inputs_NH = torch.cat([hidden for hidden, _, _ in seen])
        index_NK = torch.cat([index for _, index, _ in seen])
        for expert in range(EXPERTS):
            mine_nH = inputs_NH[(index_NK == expert).any(1)].double()
            gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
            gate, up = gate_up[:WIDTH], gate_up[WIDTH:]
            inner_nI = silu(mine_nH @ gate.double().T) * (mine_nH @ up.double().T)
            # Experts without tokens fall back to magnitudes.
            outer_H = mine_nH.norm(dim=0) if len(mine_nH) else torch.ones(HIDDEN, dtype=torch.float64)
            inner_I = inner_nI.norm(dim=0) if len(mine_nH) else torch.ones(WIDTH, dtype=torch.float64)
            zero_smallest(gate, outer_H, share)
            zero_smallest(up, outer_H, share)
            zero_smallest(down, inner_I, share)
    return model


def sparse(checkpoint: Checkpoint, plan: WeightPlan, model: PreTrainedModel) -> PreTrainedModel:
    return change_model(model, plan.outcomes, rewriter(plan, checkpoint))


def test_each_layer_is_judged_behind_the_sparse_layers_before_it(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", num_hidden_layers=3)
    plan = plan_weights(checkpoint, TEXT, PlanRequest(Wanda(), SparsityBudget(sparsity=0.5)))
    made = sparse(checkpoint, plan, build("mixtral", num_hidden_layers=3))
    expected = sparse_by_hand(build("mixtral", num_hidden_layers=3), 0.5)
    for ours, theirs in zip(find_moe_layers(made), find_moe_layers(expected), strict=True):
        assert torch.equal(ours.experts.gate_up_proj, theirs.experts.gate_up_proj), ours.index
        assert torch.equal(ours.experts.down_proj, theirs.experts.down_proj), ours.index


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "granitemoe"])
def test_statistics_are_those_of_the_whole_model_made_sparse_so_far(family: str, tmp_path: Path) -> None:
    checkpoint, model = opened(tmp_path / "m", family), build(family)
    plan = plan_weights(checkpoint, TEXT, PlanRequest(Wanda(), SparsityBudget(sparsity=0.6)))
    zeros = rewriter(plan, checkpoint)
    differ = []
    dense = record(model, BATCHES, statistics=NEEDS).require(NEEDS)
    for layer in find_moe_layers(model):
        before = record(model, BATCHES, statistics=NEEDS).require(NEEDS)[layer.index]
        for name in NEEDS:
            found = plan.statistics[layer.index][name]
            torch.testing.assert_close(found, before[name], rtol=1e-4, atol=1e-5)
        differ.append(not torch.allclose(before["input_square"], dense[layer.index]["input_square"], rtol=1e-2))
        read_block(layer).up_EIH.copy_((made := zeros(layer.index, read_block(layer))).up_EIH)
        read_block(layer).down_EHI.copy_(made.down_EHI)
        if made.gate_EIH is not None:
            read_block(layer).gate_EIH.copy_(made.gate_EIH)  # type: ignore[union-attr]
    assert differ == [False] + [True] * (len(differ) - 1), "the sparse layers before must matter here"


def test_owl_shares_by_the_model_as_it_is(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m", num_hidden_layers=3)
    method = OWL(multiple=2.0)
    plan = plan_weights(checkpoint, TEXT, PlanRequest(method, SparsityBudget(sparsity=0.6)))
    model = build("mixtral", num_hidden_layers=3)
    seen = record(model, BATCHES, statistics=NEEDS).require(NEEDS)
    shares = []
    for layer in find_moe_layers(model):
        weights, scores = read_block(layer), []
        for expert in range(EXPERTS):
            tokens_n = float(seen[layer.index]["load"][expert])
            if not tokens_n:
                continue
            outer, inner = ((seen[layer.index][name][expert] / tokens_n).sqrt() for name in NEEDS[1:])
            matrices = ((weights.gate_EIH, outer), (weights.up_EIH, outer), (weights.down_EHI, inner))
            scores += [(m[expert].double().abs() * norms).flatten() for m, norms in matrices if m is not None]
        every = torch.cat(scores)
        shares.append(100 * float((every > 2 * every.mean()).double().mean()))
    expected = owl_sparsities(shares, 0.6, 0.08)
    assert len(set(expected)) == 3
    assert [told.outcome.sparsity for told in plan.file.layers.values()] == pytest.approx(expected, abs=1e-3)
    zeros = rewriter(plan, checkpoint)
    change_model(model, plan.outcomes, zeros)
    assert zeros.count.sparsity == pytest.approx(0.6, abs=1 / WIDTH)


def test_passes_through_the_model_are_as_few_as_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, ran = opened(tmp_path / "m"), []
    own = Streamed.run
    monkeypatch.setattr(Streamed, "run", lambda self, *a: (ran.append(a[1] is not refuse_damaged), own(self, *a))[1])
    wanted: dict[SparsifyMethod, list[bool]] = {
        Magnitude(): [],
        Wanda(): [True],
        OWL(): [False, True],
        OWL(score="magnitude"): [False],
    }
    for method, passes in wanted.items():
        ran.clear()
        plan_weights(checkpoint, TEXT, PlanRequest(method, SparsityBudget(sparsity=0.5)))
        assert ran == passes, method


class _Killed(Exception):
    pass


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_an_interrupted_pass_goes_on_and_ends_the_same(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(tmp_path / "m")
    expected = plan_weights(checkpoint, TEXT, PlanRequest(OWL(), SparsityBudget(sparsity=0.5)))
    kept = CalibrationText(BATCHES, folder=tmp_path / "scratch")
    own, ran = Streamed._layer, []

    def layer(self: Streamed, index: int, *rest: Any) -> None:
        if len(ran) == at:
            raise _Killed
        ran.append(index)
        own(self, index, *rest)

    monkeypatch.setattr(Streamed, "_layer", layer)
    with pytest.raises(_Killed):
        plan_weights(checkpoint, kept, PlanRequest(OWL(), SparsityBudget(sparsity=0.5)))
    monkeypatch.setattr(Streamed, "_layer", lambda self, index, *rest: (ran.append(index), own(self, index, *rest))[1])
    assert plan_weights(checkpoint, kept, PlanRequest(OWL(), SparsityBudget(sparsity=0.5))).hash == expected.hash
    assert ran == [0, 1, 0, 1]
    # Another sparsity must not go on with layers behind other zeros.
    other = plan_weights(checkpoint, kept, PlanRequest(OWL(), SparsityBudget(sparsity=0.4)))
    assert other.hash == plan_weights(checkpoint, TEXT, PlanRequest(OWL(), SparsityBudget(sparsity=0.4))).hash


def pruned(source: Path, target: Path, keep: dict[int, tuple[int, ...]]) -> Checkpoint:
    outcomes = {layer: LayerOutcome(keep=kept) for layer, kept in keep.items()}
    apply(Checkpoint.open(source), outcomes, target, record=Record(command="a test"))
    return Checkpoint.open(target)


def test_layers_of_different_sizes(tmp_path: Path) -> None:
    plain(tmp_path / "m", "qwen3_moe")
    uneven = pruned(tmp_path / "m", tmp_path / "uneven", {0: (1, 4, 6), 1: (0, 2, 3, 5, 7)})
    plan = plan_weights(uneven, TEXT, PlanRequest(Wanda(), SparsityBudget(sparsity=0.5)))
    assert [told.experts for told in plan.file.layers.values()] == [3, 5]
    changed = sparse(uneven, plan, moekit.load(tmp_path / "uneven"))
    zeros, target = rewriter(plan, uneven), tmp_path / "sparse"
    apply(uneven, plan.outcomes, target, rewrite=zeros, record=Record(command="a test"), mtp="keep")
    again = moekit.load(target)
    torch.testing.assert_close(logits(again), logits(changed), rtol=1e-4, atol=1e-5)
    assert zeros.count.total == 8 * 3 * HIDDEN * WIDTH
    assert zeros.count.sparsity == 0.5
    original = find_original(Checkpoint.open(target))
    assert original.weights == 2 * EXPERTS * 3 * HIDDEN * WIDTH
    assert zeros.count.gone_of(original.weights) == pytest.approx(1 - 8 / 16 * 0.5)


def test_the_original_is_found_through_several_parents(tmp_path: Path) -> None:
    plain(tmp_path / "m", "qwen3_moe")
    first = pruned(tmp_path / "m", tmp_path / "a", {0: (0, 1, 2, 3, 4, 5), 1: (0, 1, 2, 3, 4, 6)})
    pruned(tmp_path / "a", tmp_path / "b", {0: (0, 1, 2), 1: (0, 1, 5)})
    second = Checkpoint.open(tmp_path / "b")
    found = find_original(second)
    assert (found.path, found.weights) == (tmp_path / "m", 2 * EXPERTS * 3 * HIDDEN * WIDTH)
    assert find_original(second, tmp_path / "a").weights == 2 * 6 * 3 * HIDDEN * WIDTH
    assert find_original(Checkpoint.open(tmp_path / "m")).path == tmp_path / "m"

    plain(tmp_path / "other", "qwen3_moe", moe_intermediate_size=16)
    with pytest.raises(BadConfig, match="is not what is left"):
        find_original(second, tmp_path / "other")
    shutil.move(tmp_path / "m", tmp_path / "moved")
    with pytest.raises(BadConfig, match="cannot be opened") as gone:
        find_original(first)
    assert "--original" in str(gone.value.hint)
    assert find_original(first, tmp_path / "moved").weights == found.weights
    plain(tmp_path / "m", "qwen3_moe", seed=3)
    with pytest.raises(BadConfig, match="no longer what it was"):
        find_original(first)


def test_a_parent_of_another_shape_is_no_original(tmp_path: Path) -> None:
    plain(tmp_path / "narrow", "qwen3_moe", moe_intermediate_size=16)
    moekit.save(build("qwen3_moe"), tmp_path / "wide", record=Record(command="a test", parent=str(tmp_path / "narrow")))
    assert find_original(Checkpoint.open(tmp_path / "wide")).path == tmp_path / "wide"


def test_what_is_refused(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m")
    with pytest.raises(BadConfig, match="input_square") as none:
        plan_weights(checkpoint, None, PlanRequest(Wanda(), SparsityBudget(sparsity=0.5)))
    assert "--data" in str(none.value.hint)
    for wrong in (-0.1, 1.0, 3.0):
        with pytest.raises(BadConfig, match="sparsity is"):
            plan_weights(checkpoint, TEXT, PlanRequest(Magnitude(), SparsityBudget(sparsity=wrong)))
    with pytest.raises(BadConfig, match=r"zeroes exactly 0\.5"):
        plan_weights(checkpoint, TEXT, PlanRequest(Wanda(pattern="2:4"), SparsityBudget(sparsity=0.4)))
    plan = plan_weights(checkpoint, TEXT, PlanRequest(Wanda(), SparsityBudget(sparsity=0.5)))
    with pytest.raises(BadConfig, match="was made for"):
        rewriter(plan, opened(tmp_path / "other", seed=1))
    one = plan_weights(checkpoint, CalibrationText([tokens(1, 20)]), PlanRequest(Wanda(), SparsityBudget(sparsity=0.5)))
    assert any("single document" in line for line in one.file.warnings)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m", "qwen3_moe")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_shard(folder / "model.safetensors", lambda tensors: tensors[name].fill_(float("nan")))
    plan = plan_weights(Checkpoint.open(folder), None, PlanRequest(Magnitude(), SparsityBudget(sparsity=0.5)))
    with pytest.raises(NumericFault) as fault:
        sparse(Checkpoint.open(folder), plan, moekit.load(folder))
    assert (fault.value.layer, fault.value.expert) == (1, 3)


def test_damaged_plans(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m")
    plan = plan_weights(checkpoint, TEXT, PlanRequest(Wanda(), SparsityBudget(sparsity=0.5)))
    plan.save(tmp_path / "p.json")
    with pytest.raises(BadData, match="no plan of `moekit sparsify` here"):
        WeightPlan.load(tmp_path / "q.json", "sparsify")
    (tmp_path / "q.json").write_text('{"format": 1, "method": "reap"}')
    with pytest.raises(BadData, match="plan of `moekit sparsify`: kind: Field required"):
        WeightPlan.load(tmp_path / "q.json", "sparsify")
    with pytest.raises(BadData, match="plan of `moekit sparsify`, not of `moekit prune`") as other:
        WeightPlan.load(tmp_path / "p.json", "prune")
    assert "sparsify --from" in str(other.value.hint)
    plan_weights(
        checkpoint, CalibrationText([tokens(2, 20, seed=9)]), PlanRequest(Wanda(), SparsityBudget(sparsity=0.5))
    ).save(tmp_path / "new.json")
    (tmp_path / "new.safetensors").replace(tmp_path / "p.safetensors")
    with pytest.raises(BadData, match=r"not the statistics that p\.json was written with"):
        WeightPlan.load(tmp_path / "p.json")
    (tmp_path / "p.safetensors").rename(tmp_path / "gone.safetensors")
    with pytest.raises(BadData, match="missing or damaged"):
        WeightPlan.load(tmp_path / "p.json")


def test_experts_without_tokens_are_warned_of(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m")
    few = CalibrationText([tokens(1, 2, seed=1)])
    plan = plan_weights(checkpoint, few, PlanRequest(Wanda(), SparsityBudget(sparsity=0.5)))
    told = plan.file.layers[0]
    assert told.never_routed
    assert told.outcome.figures["by_magnitude"] == list(map(float, told.never_routed))
    assert f"layer 0: {len(told.never_routed)} of {EXPERTS} experts" in plan.file.warnings[0]


def test_every_method_says_how_it_is_called() -> None:
    assert {record.name for record in catalogue.methods("sparsify")} >= {"magnitude", "wanda", "owl"}
    assert expert_weights({layer.index: layer.geometry for layer in find_moe_layers(build("mixtral"))}) == (
        2 * EXPERTS * 3 * HIDDEN * WIDTH
    )


def test_the_same_tokens_in_other_rows_are_measured_anew(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m")
    ids = tokens(1, 32)
    plans = [
        plan_weights(
            checkpoint, CalibrationText([ids.view(shape)], folder), PlanRequest(Wanda(), SparsityBudget(sparsity=0.5))
        )
        for shape, folder in (((2, 16), tmp_path / "f"), ((8, 4), tmp_path / "f"), ((8, 4), None))
    ]
    first, resumed, fresh = (plan.statistics[1]["input_square"] for plan in plans)
    assert torch.allclose(resumed, fresh)
    assert not torch.allclose(first, fresh)


def test_a_model_that_names_itself_as_its_parent(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "m")
    record = Record(command="a test", parent=str(tmp_path / "m"), parent_fingerprint=checkpoint.fingerprint)
    (tmp_path / "m" / "moekit.json").write_text(record.model_dump_json())
    assert find_original(Checkpoint.open(tmp_path / "m")).path == tmp_path / "m"
