"""One expert of a layer, whose projections may each be given an input of its own, or a matrix of its own.

Legend: n tokens of one expert, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy.storage import Part, Storage, activation_of
from moekit.anatomy.stored import find_storage
from moekit.errors import UnsupportedModel


@dataclass(frozen=True, eq=False)
class SplitExpert:
    """One expert whose gate and up projection may be given different inputs.

    Attributes:
        module: the experts.
        storage: how they lie.
        own: its matrices and biases.
    """

    module: Any
    storage: Storage
    own: Mapping[tuple[Part, bool], Tensor]

    def __call__(self, gate_nH: Tensor, up_nH: Tensor, factor_nI: Tensor | None = None) -> Tensor:
        """Down (act (gate x1) * (up x2) * factor), without a gate down (act (up x2) * factor): [n, H]."""
        inner_nI = self.inner(gate_nH, up_nH)
        output_nH = self.linear(inner_nI if factor_nI is None else inner_nI * factor_nI, "down")
        norm = getattr(self.module, "has_post_expert_norm", False)
        return self.module.post_expert_norm(output_nH) if norm else output_nH

    def inner(self, gate_nH: Tensor, up_nH: Tensor) -> Tensor:
        """What the down projection is given: [n, I]."""
        if not self.storage.has_gate:
            activation = activation_of(self.module, self.storage)
            assert activation is not None  # see `find_known`
            return activation(self.linear(up_nH, "up"))
        first_nI, second_nI = self.linear(gate_nH, "gate"), self.linear(up_nH, "up")
        if hasattr(self.module, "_apply_gate"):  # a family's own: some clamp, some add
            pair = (first_nI, second_nI)
            joined = torch.cat(pair, dim=1) if self.storage.concatenated else torch.stack(pair, dim=2).flatten(1)
            gated: Tensor = self.module._apply_gate(joined)
            return gated
        activation = activation_of(self.module, self.storage)
        assert activation is not None
        return activation(first_nI) * second_nI

    def linear(self, given: Tensor, part: Part) -> Tensor:
        """One projection, its bias with it."""
        weight, bias = self.matrix(part), self.matrix(part, bias=True)
        assert weight is not None
        return nn.functional.linear(given, weight.to(given.dtype), None if bias is None else bias.to(given.dtype))

    def matrix(self, part: Part, *, bias: bool = False) -> Tensor | None:
        """A projection's matrix [out, in] or bias [out], a view of what is stored; None where there is none."""
        both = self.own.get(("gate_up", bias))
        if part == "down" or both is None:
            return self.own.get((part, bias))
        half = both.shape[0] // 2
        if self.storage.concatenated:
            return both[:half] if part == "gate" else both[half:]
        return both[0::2] if part == "gate" else both[1::2]


def _known(module: nn.Module) -> Storage | None:
    storage = find_storage(module)
    if storage is None or storage.beyond:
        return None
    known = (storage.has_gate and hasattr(module, "_apply_gate")) or activation_of(module, storage) is not None
    return storage if known else None


def find_known(module: nn.Module, layer: int) -> Storage:
    """How experts lie whose projections can be computed one by one.

    Raises:
        UnsupportedModel: their weights, or the function between them, are not known.
    """
    storage = _known(module)
    if storage is None:
        raise UnsupportedModel(
            f"the projections of {type(module).__name__} cannot be computed one by one",
            layer=layer,
            hint="leave the layer out, or take a part that runs the experts as they are",
        )
    return storage


def find_split(module: nn.Module, layer: int) -> Storage:
    """How experts lie whose two inputs can be told apart.

    Raises:
        UnsupportedModel: their weights, or the function between them, are not known.
    """
    storage = _known(module)
    if storage is None or not storage.has_gate:
        raise UnsupportedModel(
            f"gate and up projections of {type(module).__name__} cannot be given different inputs",
            layer=layer,
            hint='mode "input" works with any experts',
        )
    return storage


def one_expert(module: nn.Module, storage: Storage, tensors: Mapping[str, Tensor], expert: int) -> SplitExpert:
    """An expert by number; `tensors` are the module's parameters by name."""
    own = {(p.part, p.bias): p.one(tensors, expert, storage.experts) for p in storage.projections}
    return SplitExpert(module, storage, own)
