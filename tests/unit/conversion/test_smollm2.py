"""The real SmolLM2-135M: conversions that promise it give the dense logits. Needs `moekit data fetch smollm2`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moekit.conversion import ActivationSplit, Conversion, CopyUpcycling, RandomSplit, Residual
from moekit.data.sources import get_source

SOURCE = get_source("smollm2")
TEXT = "The capital of France is Paris, and the largest city of Germany is Berlin. def main(): return 'Straße'"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE.info().cached, reason="the model is not in the cache, and tests download nothing"),
]


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(SOURCE.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return AutoTokenizer.from_pretrained(SOURCE.folder)(TEXT, return_tensors="pt").input_ids


@pytest.mark.parametrize(
    ("conversion", "tolerance"),
    [
        (CopyUpcycling(experts=4, top_k=4, target="mixtral"), 1e-4),
        (CopyUpcycling(experts=4, top_k=1), 1e-4),
        (CopyUpcycling(experts=4, top_k=2), 1e-4),
        (RandomSplit(experts=8, top_k=8, router="zero"), 1e-4),
        (ActivationSplit(experts=8, top_k=8, router="zero", shared=384), 1e-4),
        (Residual(), 0.0),
    ],
    ids=["copy-mixtral", "copy-1", "copy-2", "random", "activation", "residual"],
)
def test_logits_equal_the_dense_models(
    dense: PreTrainedModel, ids: torch.Tensor, conversion: Conversion, tolerance: float
) -> None:
    moe = conversion.convert(dense, calibration=ids.expand(8, -1))
    with torch.no_grad():
        want, got = dense(ids).logits, moe(ids).logits
    assert want.abs().max() > 20
    assert (got - want).abs().max() <= tolerance
    assert torch.equal(got.argmax(-1), want.argmax(-1))
