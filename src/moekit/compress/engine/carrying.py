"""Carry an outcome out on a layer's weights where it says everything itself: dropping, growing, merging, rounding.

Which neurons stay of a narrowed expert, and which weights become zero, an outcome does not say: a method's `transform`
does.

Legend: E experts, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.neurons.merging import merge_groups
from moekit.compress.maths.rounding import round_to_nearest
from moekit.compress.weights import LayerWeights
from moekit.errors import UnsupportedModel

FIELDS = {"gate": "gate_EIH", "up": "up_EIH", "down": "down_EHI"}
# Inputs that share a scale and a zero point.
GROUP = 128


@torch.no_grad()
def carried_out(weights: LayerWeights, outcome: LayerOutcome, layer: int | None = None) -> LayerWeights:
    """New weights of a layer: its experts selected, merged by their shares, and rounded to bits.

    Args:
        weights: of the layer as it is.
        outcome: what becomes of it.
        layer: decoder layer, for messages.

    Raises:
        UnsupportedModel: the outcome leaves something open that a rewriting must say.
    """
    for name, asked in (("width", outcome.width), ("rank", outcome.rank), ("sparsity", outcome.sparsity)):
        if asked:
            raise UnsupportedModel(
                f"the outcome gives a {name}, and nothing says which weights that means",
                layer=layer,
                hint="give the rewriting of the method that decided it",
            )
    if outcome.merges:
        shares = outcome.shares or [[1 / len(members)] * len(members) for members in outcome.sources or ()]
        made = merge_groups(weights, outcome.keep, outcome.sources or (), shares)
    else:
        made = weights.select(outcome.keep)
    changed: dict[str, Any] = {}
    for part, bits in outcome.bits.items():
        stacked = getattr(made, FIELDS[part])
        if stacked is not None:
            rounded = [round_to_nearest(matrix, n, GROUP) for matrix, n in zip(stacked, bits, strict=True)]
            changed[FIELDS[part]] = torch.stack(rounded)
    return dataclasses.replace(made, **changed)
