"""What sharers measure, against the whole model run anew with one expert rounded, and autograd on the stock model."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor, nn

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.bits import BitBudget
from moekit.compress.engine.bit_sharing import with_widths
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.sharing import BitSharer, WidthErrors, read_sharer
from moekit.compress.engine.width_errors import measure
from moekit.compress.maths.rounding import round_to_nearest
from moekit.compress.quantize.rtn import RoundToNearest
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
