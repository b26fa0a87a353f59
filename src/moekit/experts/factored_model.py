"""From factors that train to factors that are kept: rows of zeros go, and the stock weights follow.

Legend: E experts, O outputs and J inputs of a matrix, N rows that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.hollow import is_hollow
from moekit.experts.factored_expert import Factors, dense
from moekit.experts.methods.factored import Factored
from moekit.runtime.attachment import Attachment, attached
from moekit.runtime.hanging import base_of, keep_out_of_shards
from moekit.runtime.slots import PartOnLayer


@dataclass(frozen=True)
class FactoredBytes:
    """What factors weigh beside what they stand for.

    Attributes:
        factors: bytes of factors and of the numbers of kept rows.
        dense: bytes of the whole matrices, in the same dtype.
        rows: rows of residuals that are kept.
        all_rows: rows that there are.
        both: whether a checkpoint holds whole matrices, too.
    """

    factors: int
    dense: int
    rows: int
    all_rows: int
    both: bool = True

    def __str__(self) -> str:
        return (
            f"factored experts: {self.factors:,} bytes of factors for {self.dense:,} bytes of matrices "
            f"({self.factors / max(self.dense, 1):.1%}), with {self.rows:,} of {self.all_rows:,} rows of residuals; "
            + ("the shards hold whole matrices beside them" if self.both else "the shards hold no matrix of theirs")
        )


def factored(model: nn.Module) -> list[Attachment]:
    """The parts `Factored` of a model; one at most."""
    return [attachment for attachment in attached(model, "experts") if isinstance(attachment.part, Factored)]


def factors_on(on: PartOnLayer) -> Factors:
    """What a layer with the part `Factored` has learned."""
    assert isinstance(on.learned, Factors)
    return on.learned


def replaced_weights(model: nn.Module) -> set[str]:
    """Matrices of stock experts that factors stand in for: no forward pass reads them, so that they cannot train."""
    covered = {layer for attachment in factored(model) for layer in attachment.layers}
    return {
        f"{layer.experts_name}.{name}"
        for layer in (find_moe_layers(model) if covered else ())
        if layer.index in covered
        for projection in layer.storage.projections
        if not projection.bias
        for name in projection.names
    }


@torch.no_grad()
def finish(model: nn.Module) -> FactoredBytes | None:
    """Drop rows of zeros and write the product of all factors into the stock weights; the outputs stay as they are.

    Args:
        model: trained, on any device.

    Returns:
        Bytes of all layers; None for a model without factored experts.
    """
    found = factored(model)
    if not found:
        return None
    modules = {layer.index: layer.experts for layer in find_moe_layers(model)}
    counted = []
    for layer, on in found[0].layers.items():
        if not any(is_hollow(matrix) for _, matrix in dense(modules[layer], layer, 0)):
            found[0].part.give_back(on, modules[layer])
        pack(on)
        counted.append(_bytes(on, modules[layer]))
    _, base = base_of(model)
    assert base is not None
    keep_out_of_shards(model, base)
    return FactoredBytes(
        sum(c.factors for c in counted),
        sum(c.dense for c in counted),
        sum(c.rows for c in counted),
        sum(c.all_rows for c in counted),
        both=not found[0].part.leaves_out,
    )


@torch.no_grad()
def pack(on: PartOnLayer) -> None:
    """Keep the rows of residuals that are not zero, and say whose they are."""
    learned = factors_on(on)
    if not learned.residuals:
        return
    rows: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    for part, rest_EOJ in learned.residuals.items():
        owner_N, row_N = (rest_EOJ != 0).any(-1).nonzero(as_tuple=True)
        rows[f"{part}_rows"] = rest_EOJ[owner_N, row_N]
        numbers |= {f"{part}_owner": owner_N.int().cpu(), f"{part}_row": row_N.int().cpu()}
    kept = {n: p for n, p in learned.named_parameters() if not n.endswith("_rest")}
    device = next(learned.parameters()).device
    on.learned = Factors(kept | rows, {})
    on.set_constants(on.stored | numbers)
    on.to(device)


def _bytes(on: PartOnLayer, module: nn.Module) -> FactoredBytes:
    learned = factors_on(on)
    size = next(learned.parameters()).element_size()
    numbers = sum(tensor.nbytes for tensor in on.stored.values())
    matrices = [matrix for expert in range(on.geometry.experts) for _, matrix in dense(module, on.layer, expert)]
    return FactoredBytes(
        factors=learned.nbytes + numbers,
        dense=sum(matrix.numel() * size for matrix in matrices),
        rows=sum(len(learned[f"{part}_rows"]) for part in learned.matrices),
        all_rows=sum(len(matrix) for matrix in matrices),
    )
