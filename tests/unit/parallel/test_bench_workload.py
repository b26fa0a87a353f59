from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from moekit.bench.dispatch.competitors.base import all_entries
from moekit.bench.dispatch.setting import BASELINE, DispatchBenchSetting, Entry
from moekit.bench.dispatch.sources import make_source
from moekit.bench.dispatch.workload import (
    HOT_SCORE,
    Workload,
    draw_choices,
    empty_experts,
    fill,
    make_layer,
    normalise,
    reference,
    spread,
)
from moekit.errors import BadConfig, BadData
from moekit.placement import Placement
from moekit.trace import Trace, record
from tests.families import EXPERTS, FAMILIES, HIDDEN, TOP_K, WIDTH, build

SMALL = DispatchBenchSetting(tokens=5, hidden=16, experts=8, width=24, top_k=3)


def swiglu(work: Workload, x_NH: torch.Tensor, indices_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """Token by token, choice by choice."""
    gate_up_EIH, down_EHI = work.experts[0]["gate_up_proj"], work.experts[0]["down_proj"]
    width = down_EHI.shape[2]
    rows = []
    for x_H, chosen_K, weight_K in zip(x_NH, indices_NK, weights_NK, strict=True):
        total_H = torch.zeros_like(x_H)
        for expert, weight in zip(chosen_K.tolist(), weight_K, strict=True):
            gate_I, up_I = (gate_up_EIH[expert] @ x_H).split(width)
            total_H = total_H + weight * (down_EHI[expert] @ (torch.nn.functional.silu(gate_I) * up_I))
        rows.append(total_H)
    return torch.stack(rows)


def test_the_reference_is_the_formula() -> None:
    work = make_layer(SMALL)
    indices_NK, weights_NK = work.choices[""][0]
    found = reference(work)
    x_NH = work.hidden[0].clone().requires_grad_()
    gates_NK = weights_NK.clone().requires_grad_()
    work.experts[0] = {name: t.clone().requires_grad_() for name, t in work.experts[0].items()}
    y_NH = swiglu(work, x_NH, indices_NK, gates_NK)
    y_NH.backward(work.gradient(0))
    torch.testing.assert_close(found[".0.y"], y_NH.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[".0.x"], x_NH.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[".0.weights"], gates_NK.grad, rtol=1e-4, atol=1e-5)
    for name, tensor in work.experts[0].items():
        torch.testing.assert_close(found[f".0.{name}"], tensor.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_experts_of_any_family_are_taken_apart(family: str) -> None:
    model = build(family).float().eval()
    source = make_source(DispatchBenchSetting(tokens=3), model=model, layers=1)
    work = source.work
    layer = work.layers[0]
    assert (work.setting.hidden, work.setting.experts, work.setting.width) == (HIDDEN, EXPERTS, WIDTH)
    indices_NK, weights_NK = work.choices[""][layer]
    whole = reference(work)[f".{layer}.y"]
    module = empty_experts(work.config)[layer]
    total = torch.zeros_like(whole)
    # Two halves of the experts, each blind to the other's: index 4 is no expert.
    for half in range(2):
        owned = torch.arange(4) + 4 * half
        part = fill(module, work.experts[layer], owned, EXPERTS)
        local_NK = torch.where(indices_NK // 4 == half, indices_NK % 4, 4)
        with torch.no_grad():
            total += part(work.hidden[layer], local_NK, weights_NK * (local_NK < 4))
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-5)


def test_choices_are_distinct_and_repeatable() -> None:
    indices_NK, weights_NK = draw_choices(SMALL, 3)
    assert indices_NK.shape == (20, 3)
    assert all(len(set(row)) == 3 for row in indices_NK.tolist())
    torch.testing.assert_close(weights_NK.sum(1), torch.ones(20))
    assert torch.equal(indices_NK, draw_choices(SMALL, 3)[0])
    assert not torch.equal(indices_NK, draw_choices(SMALL, 4)[0])


def test_skewed_choices_have_hot_experts() -> None:
    setting = DispatchBenchSetting(routing="skewed", tokens=1000, hidden=8)
    indices_NK, _ = draw_choices(setting, 0)
    share_E = torch.bincount(indices_NK.flatten(), minlength=16) / len(indices_NK)
    assert HOT_SCORE > 0
    assert (share_E[:2] > 0.85).all()
    assert (share_E[2:] < 0.25).all()


def test_weights_sum_to_one_over_real_experts() -> None:
    indices_NK, weights_NK = normalise(
        torch.tensor([[0, 8], [1, 2], [8, 8]]), torch.tensor([[2, 9], [1, 3], [1, 1]]), 8
    )
    assert indices_NK.dtype == torch.int64
    assert weights_NK.tolist() == [[1, 0], [0.25, 0.75], [0, 0]]
    assert normalise(torch.tensor([[0, 1]]), None, 8)[1].tolist() == [[0.5, 0.5]]


def test_layers_are_spread() -> None:
    assert spread(range(22, 30), 1) == (26,)
    assert spread(range(22, 30), 2) == (24, 28)
    assert spread([3, 5], 9) == (3, 5)


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"top_k": 17}, {"ranks": 4, "nodes": 3}, {"routing": "odd"}):
        with pytest.raises(ValidationError):
            DispatchBenchSetting(**wrong)


def test_everybody_takes_part_and_the_baseline_is_first() -> None:
    entries = all_entries(["placed"], ["", "c2r"])
    assert entries[0] == BASELINE
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    for name in (
        "transformers all_reduce",
        "DeepSpeed no-drop",
        "moekit hierarchical",
        "moekit once-per-rank + placed",
        "moekit once-per-rank + placed + c2r",
    ):
        assert name in names


@pytest.fixture(scope="module")
def model() -> object:
    return build("qwen3_moe").float().eval()


@pytest.fixture(scope="module")
def trace(model: object) -> Trace:
    from moekit.data import Batch

    ids = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    document = torch.arange(2)[:, None].expand(2, 16).int()
    batch = Batch(ids, torch.ones_like(ids), document, torch.zeros_like(ids, dtype=torch.int16), ("text",))
    return record(model, [batch], weights=True)


def test_a_traces_choices_are_sent(model: object, trace: Trace) -> None:
    source = make_source(DispatchBenchSetting(tokens=6), model=model, traces={"plain": trace}, layers=2)
    assert source.work.layers == (0, 1)
    assert source.work.setting.top_k == TOP_K
    indices_NK, weights_NK = source.work.choices[""][1]
    assert torch.equal(indices_NK, trace.indices(1)[:24])
    torch.testing.assert_close(weights_NK.sum(1), torch.ones(24))
    assert "choices of the trace plain" in source.text


def test_a_trace_alone_gives_sizes(trace: Trace) -> None:
    work = make_source(DispatchBenchSetting(tokens=2, width=8), traces={"a": trace, "b": trace}, layers=1).work
    assert (work.setting.experts, work.setting.top_k, work.setting.width) == (EXPERTS, TOP_K, 8)
    assert set(work.choices) == {"", "b"}
    assert torch.isfinite(reference(work)[f"b.{work.layers[0]}.y"]).all()


def test_a_short_trace_says_how_many_tokens_there_are(trace: Trace) -> None:
    with pytest.raises(BadData, match="holds 32 tokens") as raised:
        make_source(DispatchBenchSetting(tokens=512), traces={"t": trace})
    assert "--tokens 8" in str(raised.value.hint)


def test_a_trace_of_another_model_is_refused(trace: Trace) -> None:
    other = build("qwen3_moe", num_experts=6).float().eval()
    with pytest.raises(BadData, match="8 experts, the model 6"):
        make_source(DispatchBenchSetting(tokens=2), model=other, traces={"t": trace})


def test_a_placement_for_others_is_refused(model: object) -> None:
    owners = {0: [0, 1] * 4, 1: [1, 0] * 4}
    with pytest.raises(BadConfig, match="for 2 devices"):
        make_source(
            DispatchBenchSetting(tokens=2),
            model=model,
            placements={"p": Placement(devices=2, experts=8, layers=owners, solver="random")},
        )
    short = Placement(devices=4, experts=7, layers={n: [0, 1, 2, 3, 0, 1, 2] for n in owners}, solver="random")
    with pytest.raises(BadConfig, match="places 7 experts of 8"):
        make_source(DispatchBenchSetting(tokens=2), model=model, placements={"p": short})
    good = Placement(devices=4, experts=8, layers={n: [0, 1, 2, 3] * 2 for n in owners}, solver="random")
    assert (
        make_source(DispatchBenchSetting(tokens=2), model=model, placements={"p": good}).layouts["p"][1]
        == [0, 1, 2, 3] * 2
    )


def test_an_entry_reads_as_its_parts() -> None:
    entry = Entry(peer="ours", variant="once-per-rank int8", placement="place/placement-4", routing="trace-t4")
    assert entry.name == "moekit once-per-rank int8 + place/placement-4 + trace-t4"
    assert Entry.model_validate_json(entry.model_dump_json()) == entry
