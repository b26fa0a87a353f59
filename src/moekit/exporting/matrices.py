"""The experts of a folder one matrix at a time, whether they lie split or stacked on disk.

Packed formats hold a matrix of its own for each expert and projection. Where a folder stacks them, the names are those
that transformers writes where it splits experts, as on the hub.

Legend: E experts, I expert width, H hidden, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.layout import Layout
from moekit.checkpoint.reading import TensorReader
from moekit.compress.engine.outcome import PARTS, Part
from moekit.errors import UnsupportedModel

_NAMED: dict[str, Part] = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}
_SPLIT = re.compile(rf"^(?P<stem>.+\.experts)\.(?P<expert>\d+)\.(?P<name>{'|'.join(_NAMED)})\.weight$")


@dataclass(frozen=True)
class ExpertMatrix:
    """One projection of one expert.

    Attributes:
        layer: decoder layer.
        expert: number.
        part: which projection.
        name: of its module where experts are split on disk ("model.layers.0.mlp.experts.3.gate_proj").
        live: path of the experts' module in the model ("model.layers.0.mlp.experts").
        shape: R and C.
        source: the tensor that holds it.
        rows: its rows in the expert's slice of a stack; None where the tensor is the matrix.
    """

    layer: int
    expert: int
    part: Part
    name: str
    live: str
    shape: tuple[int, int]
    source: TensorInfo
    rows: tuple[int, int] | None = None

    def read(self, reader: TensorReader) -> Tensor:
        """The weights [R, C] as they are stored."""
        if self.rows is None:
            return reader.read(self.source.name)
        return reader.read(self.source.name, (self.expert, self.expert + 1))[0, slice(*self.rows)]


def expert_matrices(checkpoint: Checkpoint) -> dict[str, list[ExpertMatrix]]:
    """Tensor on disk -> the matrices that it holds, in the order of the files; routed experts' tensors alone.

    Raises:
        UnsupportedModel: experts that are no gate, up and down matrices, or that have no names of their own.
    """
    layout = checkpoint.layout
    split = _stock_names(layout)
    found: dict[str, list[ExpertMatrix]] = {}
    for name, info in checkpoint.tensors.items():
        if not layout.is_expert(name):
            continue
        layer = layout.layer(name)
        assert layer is not None
        match = _SPLIT.match(name)
        if match is not None and len(info.shape) == 2:
            live = layout.live_name(name).rpartition(".")[0]
            shape = (info.shape[0], info.shape[1])
            part, expert = _NAMED[match["name"]], int(match["expert"])
            found[name] = [ExpertMatrix(layer, expert, part, name.removesuffix(".weight"), live, shape, info)]
        elif name in split and len(info.shape) == 3:
            found[name] = _stacked(layer, name, info, split[name])
        else:
            raise _unknown(checkpoint, name, layer)
    if not found:
        raise UnsupportedModel("the folder holds no routed experts", file=checkpoint.path)
    return found


def stock_name(layout: Layout, name: str) -> str:
    """The name that transformers writes a tensor of no expert under."""
    if name in layout.stock or name not in layout.live:
        return name
    names = [stock for stock, live in layout.target.items() if live == name]
    return names[0] if len(names) == 1 else name


def _stock_names(layout: Layout) -> dict[str, list[str]]:
    """Stacked tensor -> the names of the matrices in it, where transformers splits it."""
    found: dict[str, list[str]] = {}
    for stock, live in layout.target.items():
        if stock != live and _SPLIT.match(stock):
            found.setdefault(live, []).append(stock)
    return found


def _stacked(layer: int, name: str, info: TensorInfo, stock: list[str]) -> list[ExpertMatrix]:
    """Gate rows lie before up rows, as transformers joins the parts that it finds on disk."""
    made = []
    count = len({part for part in (_split(n)[1] for n in stock)})
    rows = info.shape[1] // count
    for stock_of in sorted(stock, key=lambda n: (_split(n)[0], PARTS.index(_split(n)[1]))):
        expert, part = _split(stock_of)
        first = rows if count == 2 and part == "up" else 0
        shape, span = (rows, info.shape[2]), (first, first + rows)
        stem, live = stock_of.removesuffix(".weight"), name.rpartition(".")[0]
        made.append(ExpertMatrix(layer, expert, part, stem, live, shape, info, span))
    return made


def _split(name: str) -> tuple[int, Part]:
    match = _SPLIT.match(name)
    assert match is not None
    return int(match["expert"]), _NAMED[match["name"]]


def _unknown(checkpoint: Checkpoint, name: str, layer: int) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name} is no gate, up or down matrix of a single expert, and transformers knows no names to split it into",
        file=checkpoint.path,
        layer=layer,
        hint="packed formats hold one matrix for each expert and projection; keep the rounded folder as it is",
    )
