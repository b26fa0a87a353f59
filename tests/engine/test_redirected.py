"""Experts go, the router goes on choosing among the old ones: the folder, the model in memory and the block that is
measured give what the stock model gives whose experts are swapped by hand, with constants added by a hook.

Legend: T tokens, K choices, E experts, H hidden.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moekit
from moekit.anatomy import find_moe_layers
from moekit.anatomy.swap import replace
from moekit.checking import check
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.apply import apply
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.redirected_block import redirected_block
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.resize import read_block
from moekit.compress.engine.rewriting import rewriter
from moekit.compress.merge.m_smoe import MSMoE
from moekit.errors import BadConfig
from moekit.trace.streamed import record_streamed
from tests.checkpoints import plain
from tests.contracts import FULL
from tests.families import EXPERTS, FAMILIES, HIDDEN, build, logits, tokens

KEEP = (1, 3, 4, 6, 7)
# Expert 0 goes to new expert 1 (old 3), experts 2 and 5 to nobody.
MIXED = LayerOutcome(keep=KEEP, redirect=(1, 0, None, 1, 2, None, 3, 4))
# Two are left: many a token has only choices of nobody.
ALONE = LayerOutcome(keep=(3, 6), redirect=(None, None, None, 0, None, None, 1, None))


def novices(model: PreTrainedModel, seed: int = 5) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer.index: torch.randn(EXPERTS, HIDDEN, generator=generator) for layer in find_moe_layers(model)}


def by_hand(model: PreTrainedModel, outcome: LayerOutcome, constants: dict[int, Tensor]) -> PreTrainedModel:
    """The stock model of as many experts, each with the weights of the one that takes its tokens."""
    made = copy.deepcopy(model)
    assert outcome.redirect is not None
    for layer in find_moe_layers(made):
        source = [None if new is None else outcome.keep[new] for new in outcome.redirect]
        with torch.no_grad():
            for name, stack in layer.experts.named_parameters(recurse=False):
                before = stack.clone()
                for old, other in enumerate(source):
                    if other is not None:
                        stack[old] = before[other]
                    elif name.startswith("down_proj"):
                        stack[old] = 0
        rows_EH = torch.zeros(EXPERTS, HIDDEN)
        for old, other in enumerate(source):
            if other is None:
                rows_EH[old] = constants[layer.index][old]

        def answer(module: Any, args: tuple[Tensor, ...], output: Tensor, rows_EH: Tensor = rows_EH) -> Tensor:
            _, index_TK, weights_TK = args
            return output + (weights_TK[..., None] * rows_EH[index_TK]).sum(1).view_as(output)

        layer.experts.register_forward_hook(answer)
    return made


# Two layouts, and both kinds of gate; the others take the long suite.
QUICK = ("deepseek_v3", "gpt_oss")
ON_ALL = [pytest.param(name, marks=() if name in QUICK else FULL, id=name) for name in sorted(FAMILIES)]


@pytest.mark.parametrize("family", ON_ALL)
def test_folder_model_and_measured_block_are_what_is_done_by_hand(family: str, tmp_path: Path) -> None:
    model = build(family)
    constants = novices(model)
    outcomes = {layer.index: MIXED for layer in find_moe_layers(model)}
    wanted = logits(by_hand(model, MIXED, constants))
    assert (wanted - logits(model)).abs().max() > 0.01

    source = Checkpoint.open(plain(tmp_path / "m", family))
    apply(source, outcomes, tmp_path / "out", novices=constants, record=Record(command="a test"))
    assert check(tmp_path / "out").ok
    opened = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu").eval()
    torch.testing.assert_close(logits(opened), wanted, rtol=1e-4, atol=1e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens(1, 4)).logits.isfinite().all()

    changed = change_model(build(family), outcomes, novices=constants)
    torch.testing.assert_close(logits(changed), wanted, rtol=1e-4, atol=1e-5)
    moekit.save(changed, tmp_path / "again")
    again = moekit.load(tmp_path / "again", dtype=torch.float32, device="cpu").eval()
    assert torch.equal(logits(again), logits(opened))

    measured = build(family)
    for layer in find_moe_layers(measured):
        weights = read_block(layer, measured.config)
        made = weights.select(MIXED.keep)
        block = redirected_block(layer, measured.config, weights, made, MIXED, constants[layer.index])
        replace(measured, layer.name, block)
    torch.testing.assert_close(logits(measured), wanted, rtol=1e-4, atol=1e-5)


def test_the_router_keeps_its_rows_bit_for_bit_and_chooses_as_before(tmp_path: Path) -> None:
    model = build("olmoe")
    source = Checkpoint.open(plain(tmp_path / "m", "olmoe"))
    layers = find_moe_layers(model)
    apply(source, {n.index: MIXED for n in layers}, tmp_path / "out", record=Record(command="a test"))
    held = load_file(tmp_path / "out" / "moekit.safetensors")
    for layer in layers:
        rows_EH = layer.require_router().weight
        place = f"constants.0.{layer.index}."
        back_EH = torch.empty_like(rows_EH)
        members_MN = held[f"{place}members"].long()
        taken_MN = members_MN >= 0
        back_EH[members_MN[taken_MN]] = held[f"{place}rows"][taken_MN]
        back_EH[held[f"{place}nobody"].long()] = held[f"{place}nobody_rows"]
        assert torch.equal(back_EH, rows_EH)

    stock, mine = (choices(m) for m in (model, moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu")))
    home = {old: new for old, new in enumerate(MIXED.redirect or ()) if new is not None}
    for (index_K, gate_K), (own_K, weight_K) in zip(zip(*stock, strict=True), zip(*mine, strict=True), strict=True):
        wanted: dict[int, float] = {}
        for old, gate in zip(index_K.tolist(), gate_K.tolist(), strict=True):
            if old in home:
                wanted[home[old]] = wanted.get(home[old], 0.0) + gate
        given = {new: w for new, w in zip(own_K.tolist(), weight_K.tolist(), strict=True) if w}
        assert given == pytest.approx(wanted)


def choices(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Indices and weights that the first layer's experts are called with."""
    seen: list[tuple[Tensor, Tensor]] = []
    experts = find_moe_layers(model)[0].experts
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append((args[1], args[2])))
    logits(model)
    handle.remove()
    return seen[0]


def test_tokens_whose_choices_are_all_nobodys_get_the_constants() -> None:
    model = build("qwen3_moe")
    constants = novices(model)
    changed = change_model(
        copy.deepcopy(model), {n.index: ALONE for n in find_moe_layers(model)}, novices=constants, top_k=None
    )
    index_TK, _ = choices(changed)
    assert bool((index_TK == len(ALONE.keep)).all(1).any()), "some tokens have no expert left"
    torch.testing.assert_close(logits(changed), logits(by_hand(model, ALONE, constants)), rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_gives_what_whole_passes_give() -> None:
    model = build("qwen3_moe")
    changed = change_model(
        copy.deepcopy(model), {n.index: MIXED for n in find_moe_layers(model)}, novices=novices(model)
    ).eval()
    prompt = tokens(2, 6)
    made = changed.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    whole = prompt
    for _ in range(5):
        whole = torch.cat([whole, changed(whole, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(made, whole)


def test_gradients_are_the_same_where_layers_are_repeated_for_the_backward_pass() -> None:
    model = build("qwen3_moe")
    outcomes, constants = {n.index: MIXED for n in find_moe_layers(model)}, novices(model)
    found = []
    for repeated in (False, True):
        changed = change_model(copy.deepcopy(model), outcomes, novices=constants).train()
        if repeated:
            changed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = tokens(2, 8)
        changed(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in changed.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_merged_copies_behind_old_rows_are_the_model_before(tmp_path: Path) -> None:
    model = build("olmoe")
    with torch.no_grad():
        for layer in find_moe_layers(model):
            for stack in layer.experts.parameters():
                stack[:] = stack[:1].clone()
    model.save_pretrained(tmp_path / "m")
    source, folders = Checkpoint.open(tmp_path / "m"), {}
    text = [tokens(4, 16)]
    for rows in ("redirect", "representative"):
        method = MSMoE(similarity="router", router=rows)
        trace = record_streamed(source, text, statistics=("load",))
        plan = plan_weights(source, trace, PlanRequest(method, Budget(keep=3)))
        folders[rows] = tmp_path / rows
        rewrite = rewriter(plan, source)
        apply(source, plan.outcomes, folders[rows], rewrite=rewrite, record=Record(command="a test"))
        for outcome in plan.outcomes.values() if rows == "redirect" else ():
            assert outcome.sources is not None
            assert all(outcome.redirect[old] == new for new, group in enumerate(outcome.sources) for old in group)
    far = {
        rows: (logits(moekit.load(folder, dtype=torch.float32, device="cpu").eval()) - logits(model)).abs().max()
        for rows, folder in folders.items()
    }
    assert far["redirect"] < 1e-5
    assert far["representative"] > 1e-3, "a gate among fewer experts is another one"


def test_nothing_is_attached_where_everything_stays(tmp_path: Path) -> None:
    source = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    every = LayerOutcome(keep=tuple(range(EXPERTS)), redirect=tuple(range(EXPERTS)))
    record = apply(source, {0: every, 1: every}, tmp_path / "out", record=Record(command="a test"))
    assert record.parts == []
    assert not (tmp_path / "out" / "moekit.safetensors").exists()
    opened = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu").eval()
    assert torch.equal(logits(opened), logits(moekit.load(tmp_path / "m", dtype=torch.float32, device="cpu").eval()))


def test_what_stock_transformers_must_load_is_refused(tmp_path: Path) -> None:
    source = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    with pytest.raises(BadConfig, match="experts that are gone") as caught:
        apply(source, {0: MIXED, 1: MIXED}, tmp_path / "out", record=Record(command="a test"), stock_only=True)
    assert "operator=drop" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_table_that_contradicts_what_stays_is_none() -> None:
    with pytest.raises(ValueError, match="its own tokens"):
        LayerOutcome(keep=(0, 1), redirect=(1, 0, None))
    with pytest.raises(ValueError, match="not there"):
        LayerOutcome(keep=(0, 1), redirect=(0, 1, 2))
