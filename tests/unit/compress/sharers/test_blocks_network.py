"""The network that tells cosines: what it converges to, and what it is taught with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.bits import BitBudget
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.width_errors import measure
from moekit.compress.maths.cosine_net import fit_cosines
from moekit.compress.quantize.rtn import RoundToNearest
from moekit.compress.sharers import blocks
from moekit.compress.sharers.blocks import Blocks
from tests.checkpoints import plain
from tests.families import build, tokens


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("sign", "tokens_", "epochs", "near"),
    [
        (-1.0, 700, 40, 0.1),
        pytest.param(1.0, 6000, 100, 0.01, marks=[pytest.mark.full, pytest.mark.slow]),
        pytest.param(-1.0, 6000, 100, 0.01, marks=[pytest.mark.full, pytest.mark.slow]),
    ],
)
def test_a_block_that_changes_nothing_or_turns_all_round_is_told(
    sign: float, tokens_: int, epochs: int, near: float
) -> None:
    x_NH = torch.randn(tokens_, 48, generator=generator())
    fitted = fit_cosines(x_NH, cosine_similarity(x_NH, sign * x_NH), generator(), epochs=epochs)
    assert fitted.mean(x_NH) == pytest.approx(sign, abs=near)


def test_tokens_it_has_not_learned_from_are_told_better_than_by_their_mean() -> None:
    x_NH = torch.randn(1000, 32, generator=generator())
    made_NH = torch.where(x_NH[:, :1] > 0, x_NH, torch.roll(x_NH, 1, dims=1))
    fitted = fit_cosines(x_NH, cosine_similarity(x_NH, made_NH), generator(), epochs=20)
    assert fitted.error < 0.9 * fitted.variance
    assert fitted.variance == pytest.approx(float(cosine_similarity(x_NH, made_NH).var()), rel=0.2)


@pytest.mark.parametrize("of", ["block", "stream"])
def test_it_is_taught_by_what_the_model_shows(of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("qwen3_moe"), tokens(3, 16, seed=31)
    seen: list[Any] = []
    stock = blocks.fit_cosines
    monkeypatch.setattr(blocks, "fit_cosines", lambda *a: (seen.append(a), stock(*a, epochs=2))[1])
    request = PlanRequest(RoundToNearest(group=8), BitBudget(mean=3, choices=(2, 4), share={"use": "blocks"}))
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 16, [1] * 16, [1] * 10 + [0] * 6])}
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    statistics, _ = measure(
        checkpoint, CalibrationText([padded]), request, Blocks(of=of, by="network", tokens=1000), (2, 4)
    )
    given: list[Any] = []
    for layer in find_moe_layers(model):
        layer.block.register_forward_hook(lambda m, a, o: given.append((a[0], o)))
    model.model.layers[1].register_forward_hook(lambda m, a, o: given.append(o))
    with torch.no_grad():
        model(**padded)
    mask = padded["attention_mask"].flatten().bool()
    (x, y), after = given[1], given[2][0] if isinstance(given[2], tuple) else given[2]
    x, y, after = (t.reshape(48, -1)[mask] for t in (x, y[0] if isinstance(y, tuple) else y, after))
    if of == "stream":
        x, y = after - y, after
    torch.testing.assert_close(seen[1][0], x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[1][1], cosine_similarity(x, y), atol=1e-4, rtol=1e-4)
    name = "block_cosine" if of == "block" else "block_residual_cosine"
    assert float(statistics[1][name]) == pytest.approx(float(seen[1][1].sum()), abs=1e-3)
    told = statistics[1].kept("told_cosine")
    assert told is not None
    assert -1 <= float(told[0]) <= 1
    few, _ = measure(checkpoint, CalibrationText([padded]), request, Blocks(of=of, by="network", tokens=20), (2, 4))
    assert len(seen[-1][0]) == 14  # every third of 42
    assert few.keys() == statistics.keys()
