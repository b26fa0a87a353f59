"""Weights of one MoE layer in one layout for all families, and back into the family's own.

Families fuse gate and up rows in two ways, store matrices either way round and have biases or not. Methods see none of
that: they see an expert as I neurons, each a gate row, an up row and a down column.

Legend: E experts, I expert width, H hidden, M experts kept, F = 3H (2H without a gate).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.anatomy.storage import Part, Projection, Storage
from moekit.errors import UnsupportedModel


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Routed experts and router of one layer.

    Attributes:
        up_EIH: up projections, rows are neurons.
        down_EHI: down projections, columns are neurons.
        gate_EIH: gate projections; None where experts have none.
        up_bias_EI: biases of the up projections.
        gate_bias_EI: biases of the gate projections.
        down_bias_EH: biases of the down projections.
        router: the router's tensors that count experts, by name below the block, expert axis first: the weight
            [E, H], biases and selection biases [E].
        others: any further stacked tensors of the experts, [E, ...].
    """

    up_EIH: Tensor
    down_EHI: Tensor
    gate_EIH: Tensor | None = None
    up_bias_EI: Tensor | None = None
    gate_bias_EI: Tensor | None = None
    down_bias_EH: Tensor | None = None
    router: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """E."""
        return self.up_EIH.shape[0]

    @property
    def width(self) -> int:
        """I."""
        return self.up_EIH.shape[1]

    @property
    def hidden(self) -> int:
        """H."""
        return self.up_EIH.shape[2]

    @property
    def router_EH(self) -> Tensor:
        """The router's matrix, a row for each expert.

        Raises:
            UnsupportedModel: the router has no single matrix [E, H].
        """
        found = [t for t in self.router.values() if t.dim() == 2 and t.shape == (self.experts, self.hidden)]
        if len(found) != 1:
            raise UnsupportedModel(
                f"the router has {len(found)} matrices of {self.experts} x {self.hidden}, not one",
                hint="choose a method that reads statistics only (moekit methods prune)",
            )
        return found[0]

    def neurons_EIF(self, parts: Sequence[str] = ("gate", "up", "down")) -> Tensor:
        """Each neuron as one vector: its gate row, up row and down column, joined.

        Args:
            parts: which of "gate", "up", "down" to join, in this order; a gate that is not there is left out.
        """
        named = {"gate": self.gate_EIH, "up": self.up_EIH, "down": self.down_EHI.transpose(1, 2)}
        return torch.cat([t for part in parts if (t := named[part]) is not None], dim=-1)

    def expert(self, number: int) -> list[Tensor]:
        """All tensors of one expert, the router's left out."""
        return [t[number] for t in self._stacked().values()]

    def _stacked(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {n: t for n, t in named.items() if isinstance(t, Tensor)} | dict(self.others)

    def select(self, experts: Sequence[int]) -> LayerWeights:
        """These experts with their router rows, in this order; a copy."""
        index = torch.tensor(list(experts), dtype=torch.int64)
        return self.map(lambda t: t.index_select(0, index.to(t.device)))

    def map(self, function: Callable[[Tensor], Tensor], *, router: bool = True) -> LayerWeights:
        """Apply a function to every tensor, expert axis first; the router's left as they are with `router=False`."""
        changed: dict[str, Any] = {
            f.name: None if (t := getattr(self, f.name)) is None else function(t)
            for f in dataclasses.fields(self)
            if f.name not in ("router", "others")
        }
        rows = {n: function(t) for n, t in self.router.items()} if router else dict(self.router)
        return LayerWeights(**changed, router=rows, others={n: function(t) for n, t in self.others.items()})

    def with_router(self, router: Mapping[str, Tensor]) -> LayerWeights:
        """The same experts under other router tensors."""
        return dataclasses.replace(self, router=dict(router))


def outputs(weights: LayerWeights, expert: int, inputs_NH: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Output of one expert by the plain formula, [N, H]: down (act(gate x) * up x), in the inputs' dtype.

    Args:
        weights: of the layer.
        expert: which expert.
        inputs_NH: what it sees.
        activation: of the gate (of the up projection where there is no gate).
    """

    def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))

    def of(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[expert]

    up_NI = linear(inputs_NH, weights.up_EIH[expert], of(weights.up_bias_EI))
    if weights.gate_EIH is None:
        inner_NI = activation(up_NI)
    else:
        inner_NI = activation(linear(inputs_NH, weights.gate_EIH[expert], of(weights.gate_bias_EI))) * up_NI
    return linear(inner_NI, weights.down_EHI[expert], of(weights.down_bias_EH))


def from_storage(tensors: Mapping[str, Tensor], storage: Storage, router: Mapping[str, Tensor]) -> LayerWeights:
    """Bring a live layer's tensors into the common layout; views where that can be.

    Args:
        tensors: of the experts module, by name; those that are no projection but stacked by expert are taken along.
        storage: which of them is what.
        router: the router's tensors, expert axis first.
    """
    read = {(p.part, p.bias): p.read(tensors, storage.experts) for p in storage.projections}
    for bias in (False, True):
        both = read.pop(("gate_up", bias), None)
        if both is not None:
            read["gate", bias], read["up", bias] = _part(both, storage.concatenated)
    known = set(storage.names)
    others = {n: t for n, t in tensors.items() if n not in known and t.dim() and t.shape[0] == storage.experts}
    return LayerWeights(
        read["up", False],
        read["down", False],
        read.get(("gate", False)),
        read.get(("up", True)),
        read.get(("gate", True)),
        read.get(("down", True)),
        dict(router),
        others,
    )


def to_storage(weights: LayerWeights, storage: Storage) -> dict[str, Tensor]:
    """The experts module's tensors in the family's own layout, by name; inverse of `from_storage`.

    Args:
        weights: of the experts.
        storage: of a module of so many experts.
    """
    values: dict[tuple[str, bool], Tensor | None] = {
        ("gate", False): weights.gate_EIH,
        ("up", False): weights.up_EIH,
        ("down", False): weights.down_EHI,
        ("gate", True): weights.gate_bias_EI,
        ("up", True): weights.up_bias_EI,
        ("down", True): weights.down_bias_EH,
    }
    live = dict(weights.others)
    for projection in storage.projections:
        bias = projection.bias
        if projection.part == "gate_up":
            gate, up = values["gate", bias], values["up", bias]
            value = None if gate is None or up is None else _join(gate, up, storage.concatenated)
        else:
            value = values[projection.part, bias]
        if value is not None:
            live |= projection.write(value)
    return live


def from_live(experts: Mapping[str, Tensor], router: Mapping[str, Tensor], geometry: Geometry) -> LayerWeights:
    """`from_storage` for tensors that are stacked by expert and named as transformers names them.

    Args:
        experts: own tensors of the experts module that are stacked by expert, by name.
        router: the router's tensors, expert axis first.
        geometry: of the layer.
    """
    return from_storage(experts, stacked_storage(geometry, experts), router)


def to_live(weights: LayerWeights, geometry: Geometry) -> dict[str, Tensor]:
    """Inverse of `from_live`."""
    name = "gate_up_proj" if geometry.has_gate else "up_proj"
    biases = {f"{name}_bias": weights.up_bias_EI, "down_proj_bias": weights.down_bias_EH}
    return to_storage(weights, stacked_storage(geometry, {n for n, t in biases.items() if t is not None}))


def stacked_storage(geometry: Geometry, names: Collection[str]) -> Storage:
    """How a module of this geometry holds experts as stacks; biases are those among `names`."""
    parts: tuple[Part, ...] = ("gate_up" if geometry.has_gate else "up", "down")
    matrices = [Projection(part, (f"{part}_proj",), transposed=geometry.transposed) for part in parts]
    biases = [Projection(part, (f"{part}_proj_bias",), bias=True) for part in parts if f"{part}_proj_bias" in names]
    return Storage(
        "stacked", geometry.experts, geometry.hidden, geometry.width, (*matrices, *biases), geometry.concatenated
    )


def _part(both: Tensor, concatenated: bool) -> tuple[Tensor, Tensor]:
    """Gate and up out of rows that hold one after the other, or alternate."""
    if concatenated:
        gate, up = both.chunk(2, dim=1)
        return gate, up
    return both[:, 0::2], both[:, 1::2]


def _join(gate: Tensor, up: Tensor, concatenated: bool) -> Tensor:
    if concatenated:
        return torch.cat([gate, up], dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2)
