"""Ask a router part by itself, without a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moekit.anatomy import Geometry
from moekit.anatomy.gate import Gate
from moekit.runtime.router import ChoosePart, LimitPart, Routed, RouteInputs, RouterPart


def routed(
    part: RouterPart,
    gate: Gate,
    logits_TE: Tensor,
    constants: Mapping[str, Tensor] | None = None,
    hidden_TH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights and indices that a choosing or limiting part gives; limits follow the gate's own choice.

    Args:
        part: the part.
        gate: the family's gate.
        logits_TE: router logits.
        constants: as `prepare` returns them.
        hidden_TH: what the router saw; empty where the part does not look.
    """
    inputs = RouteInputs(
        gate=gate,
        logits=logits_TE,
        hidden_TH=torch.empty(0) if hidden_TH is None else hidden_TH,
        layer=0,
        geometry=Geometry(8, logits_TE.shape[1], gate.spec.top_k, 8, 0, True, False, False, True),
        constants=constants or {},
    )
    if isinstance(part, ChoosePart):
        found = part.choose(inputs)
    else:
        assert isinstance(part, LimitPart)
        found = part.limit(inputs, Routed(*gate(logits_TE)))
    return found.weights, found.indices
