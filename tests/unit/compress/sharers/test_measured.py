"""What sharers measure, against the whole model run anew with one expert rounded, and autograd on the stock model."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.bits import BitBudget
from moekit.compress.engine import bit_sharing
from moekit.compress.engine.bit_sharing import with_widths
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.sharing import BitSharer, WidthErrors, read_sharer
from moekit.compress.engine.width_errors import measure
from moekit.compress.maths.rounding import round_to_nearest
from moekit.compress.quantize.rtn import RoundToNearest
from moekit.compress.sharers.gemq import Gemq
from moekit.errors import BadConfig
from moekit.trace.statistics import LayerStatistics
from tests.checkpoints import plain
from tests.families import EXPERTS, build, tokens

WIDTHS, GROUP = (1, 2, 4), 8
IDS, SHORT = tokens(3, 16, seed=31), tokens(2, 9, seed=32)
PADDED = {"input_ids": SHORT, "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])}
METHOD = RoundToNearest(group=GROUP)
_KEPT = TemporaryDirectory()


@cache
def checkpoint(family: str) -> Checkpoint:
    return Checkpoint.open(plain(Path(_KEPT.name) / family, family))


def measured(
    family: str, sharer: BitSharer, folder: Path | None = None
) -> tuple[dict[int, LayerStatistics], dict[int, WidthErrors]]:
    budget = BitBudget(mean=2, choices=WIDTHS, share={"use": "pmq"})
    text = CalibrationText([{"input_ids": IDS}, PADDED], folder)
    return measure(checkpoint(family), text, PlanRequest(METHOD, budget), sharer, WIDTHS)


def outputs_of(module: nn.Module, model: nn.Module, batch: dict[str, Tensor], *, grad: bool = False) -> Tensor:
    """What a module gives, positions without padding in one row."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().flatten()
    with torch.set_grad_enabled(grad):
        model(**batch)
    handle.remove()
    return seen[0].reshape(len(mask), -1)[mask].double()


def rounded(model: nn.Module, family: str, layer: int, expert: int, bits: int) -> nn.Module:
    """A copy of the model in which one expert alone is rounded, straight on the stock parameters."""
    made = copy.deepcopy(model)
    experts = find_moe_layers(made)[layer].experts
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            matrix = getattr(experts, name).data[expert]
            turned = matrix.T if family == "gpt_oss" else matrix
            new = round_to_nearest(turned.contiguous(), bits, GROUP)
            matrix.copy_(new.T if family == "gpt_oss" else new)
    return made


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_errors_are_those_of_the_block_with_one_expert_rounded(family: str) -> None:
    model = build(family)
    statistics, errors = measured(family, read_sharer("pmq"))
    for layer, expert, c in ((0, 1, 0), (0, 4, 2), (1, 0, 1)):
        changed = rounded(model, family, layer, expert, WIDTHS[c])
        gap = 0.0
        for batch in ({"input_ids": IDS}, PADDED):
            one, two = (outputs_of(find_moe_layers(m)[layer].block, m, batch) for m in (model, changed))
            gap += float((one - two).square().sum())
        assert float(errors[layer].squared_EC[expert, c]) == pytest.approx(gap, rel=2e-3, abs=1e-9)
    for layer, own in errors.items():
        assert bool((own.squared_EC.diff(dim=1) <= 0).all()), "finer is nearer"
        unused = statistics[layer]["load"] == 0
        assert not bool(own.squared_EC[unused].any())
        scores = statistics[layer]["chosen_score"]
        assert bool((scores <= statistics[layer]["load"]).all())


def test_errors_of_the_loss_weigh_channels_by_squared_gradients() -> None:
    model, layer, expert, c = build("qwen3_moe"), 1, 2, 0
    _, errors = measured("qwen3_moe", read_sharer("gemq"))
    moe = find_moe_layers(model)[layer]
    changed = rounded(model, "qwen3_moe", layer, expert, WIDTHS[c])
    total = 0.0
    for batch in ({"input_ids": IDS}, PADDED):
        given: list[Tensor] = []
        handle = moe.experts.register_forward_hook(lambda m, a, o, given=given: given.append(o))
        logits = model(**batch).logits.double()
        handle.remove()
        ids, mask = batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        loss = torch.zeros((), dtype=torch.float64)
        for row in range(len(ids)):
            for at in range(1, ids.shape[1]):
                if mask[row, at] and mask[row, at - 1]:
                    loss = loss - logits[row, at - 1].log_softmax(-1)[ids[row, at]]
        (gradient,) = torch.autograd.grad(loss, given[0])
        kept = gradient.reshape(mask.numel(), -1)[mask.flatten()].double()
        one, two = (outputs_of(find_moe_layers(m)[layer].experts, m, batch) for m in (model, changed))
        total += float((kept * (one - two)).square().sum())
    assert float(errors[layer].squared_EC[expert, c]) == pytest.approx(total, rel=2e-3)
    assert not any(p.grad is not None for p in model.parameters())


def test_scores_are_those_before_weights_are_normalised() -> None:
    model = build("qwen3_moe")
    statistics, _ = measured("qwen3_moe", read_sharer("pmq"))
    sums = torch.zeros(EXPERTS, dtype=torch.float64)
    router = find_moe_layers(model)[0].router
    assert router is not None
    for batch in ({"input_ids": IDS}, PADDED):
        seen: list[Tensor] = []
        handle = router.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().flatten()
        hidden = seen[0].reshape(len(mask), -1)[mask]
        scores = (hidden.double() @ router.weight.double().T).softmax(-1)  # type: ignore[operator,union-attr]
        for row in scores:
            top = row.topk(model.config.num_experts_per_tok)
            sums[top.indices] += top.values.detach()
    torch.testing.assert_close(statistics[0]["chosen_score"], sums, rtol=1e-4, atol=1e-6)


def test_what_was_measured_is_read_again_after_an_interruption(tmp_path: Path) -> None:
    first, second = (measured("qwen3_moe", read_sharer("pmq"), tmp_path)[1] for _ in range(2))
    assert all(torch.equal(first[n].squared_EC, second[n].squared_EC) for n in first)
    assert [first[n].energy for n in first] == [second[n].energy for n in second]


def test_a_shared_budget_says_the_width_of_each_expert_and_is_shared_once() -> None:
    budget = BitBudget(mean=2.5, choices=(2, 3, 4), share={"use": "pmq"})
    request, text = PlanRequest(METHOD, budget), CalibrationText([{"input_ids": IDS}])
    shared = with_widths(checkpoint("qwen3_moe"), text, request)
    assert isinstance(shared.budget, BitBudget)
    widths = shared.budget.widths
    assert widths is not None
    assert all(sum(own) == 20 and {3, 4} <= set(own) for own in widths.values())
    assert with_widths(checkpoint("qwen3_moe"), None, shared) is shared
    with pytest.raises(BadConfig, match="pmq shares bits by what a text shows"):
        with_widths(checkpoint("qwen3_moe"), None, request)


def by_brute_force(costs: list[list[float]], widths: tuple[int, ...], most: int) -> float:
    """Least cost of all shares of at most so many bits, found by trying each."""
    found = float("inf")
    for taken in itertools.product(range(len(widths)), repeat=len(costs)):
        if sum(widths[c] for c in taken) <= most:
            found = min(found, sum(own[c] for own, c in zip(costs, taken, strict=True)))
    return found


def test_every_round_shares_what_was_measured_on_the_model_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three experts a layer: few enough to try every share."""
    family, few = {"num_experts": 3, "num_experts_per_tok": 2}, TemporaryDirectory()
    folder = Checkpoint.open(plain(Path(few.name) / "m", "qwen3_moe", **family))
    model, seen = build("qwen3_moe", **family), list[tuple[Any, Any]]()

    def look(*args: Any) -> Any:
        found = measure(*args)
        seen.append((args[6], found[1]))
        return found

    monkeypatch.setattr(bit_sharing, "measure", look)
    budget = BitBudget(mean=1.5, choices=WIDTHS, share={"use": "gemq", "rounds": 3})
    plan = plan_weights(folder, CalibrationText([{"input_ids": IDS}]), PlanRequest(METHOD, budget))
    told = plan.file.budget
    assert isinstance(told, BitBudget)
    assert told.mean == 1.5
    widths: list[Any] = [behind.outcomes for behind, _ in seen[1:]] + [plan.outcomes]
    assert [behind is None for behind, _ in seen] == [True, False, False]
    for mean, (_, errors), outcomes in zip((2.5, 2.0, 1.5), seen, widths, strict=True):
        bits = [n for layer in errors for n in outcomes[layer].bits["up"]]
        assert sum(bits) <= mean * len(bits)
        costs = [own for layer in errors for own in errors[layer].squared_EC.tolist()]
        spent = sum(own[WIDTHS.index(n)] for own, n in zip(costs, bits, strict=True))
        assert spent == pytest.approx(by_brute_force(costs, WIDTHS, int(mean * len(bits))), rel=1e-9)
    # What the second round measured: gradients and inputs of the rounded model, distances from experts as they were.
    rounded_model = copy.deepcopy(model)
    for moe in find_moe_layers(rounded_model):
        for e, n in enumerate(widths[0][moe.index].bits["up"]):
            one = rounded(model, "qwen3_moe", moe.index, e, n)
            for name in ("gate_up_proj", "down_proj"):
                getattr(moe.experts, name).data[e] = getattr(find_moe_layers(one)[moe.index].experts, name).data[e]
    layer, expert, c = 1, 1, 0
    at = find_moe_layers(rounded_model)[layer].experts
    calls: list[Any] = []
    handle = at.register_forward_hook(lambda m, a, o: calls.append((a, o)))
    logits = rounded_model(input_ids=IDS).logits.double().log_softmax(-1)
    handle.remove()
    loss = -logits[:, :-1].gather(2, IDS[:, 1:, None]).sum()
    ((x_TH, index_TK, weight_TK), out), *_ = calls
    (g_TH,) = torch.autograd.grad(loss, out)
    gap = torch.zeros(len(x_TH), x_TH.shape[1], dtype=torch.float64)
    for source, sign in ((rounded(model, "qwen3_moe", layer, expert, WIDTHS[c]), 1), (model, -1)):
        stack = find_moe_layers(source)[layer].experts
        gate, up = (x_TH @ stack.gate_up_proj[expert].T).chunk(2, dim=-1)  # type: ignore[index,union-attr]
        made = (nn.functional.silu(gate) * up) @ stack.down_proj[expert].T  # type: ignore[index,union-attr]
        gap += sign * (made * (weight_TK * (index_TK == expert)).sum(1, keepdim=True)).double()
    expected = float((g_TH.double().reshape(gap.shape) * gap).square().sum().detach())
    assert float(seen[1][1][layer].squared_EC[expert, c]) == pytest.approx(expected, rel=5e-3)


def test_rounds_come_down_in_equal_steps() -> None:
    assert Gemq().means(2.0, (2, 3, 4)) == (2.0,)
    assert Gemq(rounds=3).means(2.0, (1, 2, 3)) == (3.0, 2.5, 2.0)
    assert Gemq(rounds=3).means(2.5, (1, 2, 3)) == (3.0, 2.75, 2.5)
    assert Gemq(rounds=2, start=2.25).means(2.0, (1, 2, 3)) == (2.25, 2.0)
    with pytest.raises(BadConfig, match="begin at a mean of"):
        Gemq(rounds=2, start=1.5).means(2.0, (1, 2, 3))
