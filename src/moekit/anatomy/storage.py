"""How a module stores its routed experts: which tensors, which projection each holds, which way round it lies.

Four ways are known, told by shapes and by asking, never by the name of a class:

- *stacked*: own tensors [E, ...], a `down_proj` and `gate_up_proj` or `up_proj` (what transformers v5 prefers);
- *joined*: a child whose function is given each expert's matrices, cut out of tensors [E * I, H] (DBRX);
- *paired*: two children with a `weight` [E, out, in] each, one into the experts and one out of them (JetMoe);
- *listed*: a child module for every expert, with one linear map in and one out (Switch Transformers, NLLB).

Legend: E experts, I expert width, H hidden, J = 2I where gate and up rows lie in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Part = Literal["gate_up", "gate", "up", "down"]


@dataclass(frozen=True)
class Projection:
    """One projection of all experts, or its biases.

    Attributes:
        part: "gate_up" (both in one tensor), "gate", "up" or "down".
        names: of its tensors below the module: one of all experts, or one of each.
        bias: whether these are biases.
        transposed: matrices lie [in, out] rather than [out, in].
        joined: experts lie behind each other along the first axis, [E * rows, ...].
    """

    part: Part
    names: tuple[str, ...]
    bias: bool = False
    transposed: bool = False
    joined: bool = False

    def read(self, tensors: Mapping[str, Tensor], experts: int) -> Tensor:
        """All experts' matrices [E, out, in], or biases [E, out]; a view where that can be."""
        if len(self.names) > 1:
            stacked = torch.stack([tensors[name] for name in self.names])
        else:
            stacked = tensors[self.names[0]]
            stacked = stacked.view(experts, -1, *stacked.shape[1:]) if self.joined else stacked[:experts]
        return stacked.transpose(1, 2) if self.transposed else stacked

    def one(self, tensors: Mapping[str, Tensor], expert: int, experts: int) -> Tensor:
        """One expert's matrix [out, in], or bias [out]; a view."""
        if len(self.names) > 1:
            own = tensors[self.names[expert]]
        else:
            whole = tensors[self.names[0]]
            own = whole.view(experts, -1, *whole.shape[1:])[expert] if self.joined else whole[expert]
        return own.T if self.transposed else own

    def write(self, value: Tensor) -> dict[str, Tensor]:
        """Inverse of `read`: [E, out, in] or [E, out] as the module's tensors, by name."""
        value = (value.transpose(1, 2) if self.transposed else value).contiguous()
        if len(self.names) > 1:
            return dict(zip(self.names, value.unbind(0), strict=True))
        return {self.names[0]: value.flatten(0, 1) if self.joined else value}


@dataclass(frozen=True)
class Storage:
    """Where a module's experts lie.

    Attributes:
        kind: which of the ways.
        experts: E of this module.
        hidden: H.
        width: I.
        projections: all of them.
        concatenated: in "gate_up" gate rows come first, then up rows; False where they alternate.
        activation: path of the activation below the module, "" where it is not known.
        beyond: further experts, behind the others, that hold no weights of use (LongCat's copy their input).
    """

    kind: Literal["stacked", "joined", "paired", "listed"]
    experts: int
    hidden: int
    width: int
    projections: tuple[Projection, ...]
    concatenated: bool = True
    activation: str = ""
    beyond: int = 0

    @property
    def has_gate(self) -> bool:
        """Whether experts have gate projections."""
        return any(p.part in ("gate_up", "gate") for p in self.projections)

    @property
    def has_bias(self) -> bool:
        """Whether projections carry biases."""
        return any(p.bias for p in self.projections)

    @property
    def transposed(self) -> bool:
        """Whether the down projection lies [in, out]."""
        return any(p.transposed for p in self.projections if p.part == "down" and not p.bias)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, below the module."""
        return tuple(name for p in self.projections for name in p.names)


def activation_of(module: Any, storage: Storage) -> Callable[[Tensor], Tensor] | None:
    """The activation between the projections; None where it is not known."""
    found = module
    for part in storage.activation.split(".") if storage.activation else ("-",):
        found = getattr(found, part, None)
    return found if callable(found) else None


def expert_of(module: nn.Module, storage: Storage, expert: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """One expert by the plain formula: down (act(gate x) * up x), without a gate down (act(up x)).

    Args:
        module: that holds it.
        storage: how; its activation must be known.
        expert: which one.

    Returns:
        From inputs [n, H] to (inputs of the down projection [n, I], outputs [n, H]).
    """
    tensors = dict(module.named_parameters())
    own = {(p.part, p.bias): p.one(tensors, expert, storage.experts) for p in storage.projections}
    activation = activation_of(module, storage)
    assert activation is not None

    def linear(given: Tensor, part: Part) -> Tensor:
        return nn.functional.linear(given, own[part, False], own.get((part, True)))

    def run(hidden_nH: Tensor) -> tuple[Tensor, Tensor]:
        if ("gate_up", False) in own:
            both = linear(hidden_nH, "gate_up")
            half = both.shape[-1] // 2
            joined = storage.concatenated
            gate, up = (both[:, :half], both[:, half:]) if joined else (both[:, 0::2], both[:, 1::2])
            inner_nI = activation(gate) * up
        elif ("gate", False) in own:
            inner_nI = activation(linear(hidden_nH, "gate")) * linear(hidden_nH, "up")
        else:
            inner_nI = activation(linear(hidden_nH, "up"))
        return inner_nI, linear(inner_nI, "down")

    return run
