"""An experts part computes what its plain fp32 reference does, one expert after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moekit.anatomy import find_moe_layers
from moekit.catalogue import MethodRecord
from moekit.runtime.experts import ExpertsInputs, ExpertsPart, inputs_of
from tests.families import EXPERTS, build
from tests.parts import FAMILIES, stir
from tests.runtime_cases import cases, hang


@torch.no_grad()
@pytest.mark.parametrize(("record", "family"), cases(["experts"], families=len(FAMILIES)))
def test_the_part_equals_its_reference(record: MethodRecord, family: str) -> None:
    model = build(family)
    attachment = hang(model, family, record)
    part = attachment.part
    assert isinstance(part, ExpertsPart)
    stir(model)
    generator = torch.Generator().manual_seed(0)
    for layer in find_moe_layers(model):
        hidden_TH = torch.randn(30, layer.geometry.hidden, generator=generator)
        index_TK = torch.rand(30, EXPERTS, generator=generator).topk(2, dim=-1).indices
        index_TK[:5, 1] = EXPERTS
        weights_TK = torch.rand(30, 2, generator=generator).masked_fill(index_TK == EXPERTS, 0)
        inputs = seen(attachment.layers[layer.index], layer.experts, hidden_TH, index_TK, weights_TK)
        expected_TH = part.reference(inputs)
        torch.testing.assert_close(layer.experts(hidden_TH, index_TK, weights_TK), expected_TH, atol=1e-5, rtol=1e-4)


def seen(on: nn.Module, experts: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> ExpertsInputs:
    """What the part sees of one call."""

    def never(*_: Tensor) -> Tensor:
        raise AssertionError("a reference must not run what it is compared with")

    return inputs_of(on, experts, hidden_TH, index_TK, weights_TK, never)  # type: ignore[arg-type]
