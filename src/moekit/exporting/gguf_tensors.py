"""The tensors of a GGUF file to come: which name, type and bytes each tensor of a folder gets there.

Experts that lie on symmetric grids become blocks of whole numbers (`gguf_blocks`). All other matrices are written as
they are stored or in a type that is asked for; vectors and routers in float32, as llama.cpp wants them.

Legend: E experts, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import where
from moekit.checkpoint.reading import TensorReader
from moekit.compress.engine.grids import Grids
from moekit.compress.engine.outcome import PARTS
from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.exporting import gguf_blocks, gguf_kquants
from moekit.exporting.gguf_blocks import Bytes
from moekit.exporting.gguf_families import Family
from moekit.exporting.gguf_grouped import is_latent, latent_parts, latent_shapes
from moekit.exporting.gguf_kquants import TensorType
from moekit.exporting.matrices import ExpertMatrix, stock_name
from moekit.exporting.rounded import Planned, recovered

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Planted:
    """A tensor of the file.

    Attributes:
        name: in GGUF.
        kind: of its numbers: F32, F16, BF16, Q8_0, Q5_0 or Q4_0.
        shape: rows last but one, columns last.
        make: reads it and gives its bytes, a row of bytes for each row.
        experts: whether it holds routed experts' matrices.
        final: type that llama.cpp is told to give it; None where it may choose, or nothing is rounded by it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[TensorReader], Bytes]
    experts: bool = False
    final: str | None = None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Sizes in bytes along the last axis."""
        return (*self.shape[:-1], row_bytes(self.kind, self.shape[-1]))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.byte_shape)


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row."""
    if kind in gguf_blocks.BYTES:
        return columns // gguf_blocks.BLOCK * gguf_blocks.BYTES[kind]
    return columns * _ITEM_BYTES[kind]


def package() -> Any:
    """The `gguf` package.

    Raises:
        UnsupportedModel: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UnsupportedModel(
            "GGUF files are written with the package gguf, which is not installed",
            hint="pip install 'moekit[export]'",
        ) from error


def tensor_names(family: Family, config: Any) -> Any:
    """llama.cpp's names of a family's tensors, as the `gguf` package knows them."""
    gguf = package()
    return gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.architecture), int(config.num_hidden_layers))


def other_tensors(
    checkpoint: Checkpoint, config: Any, family: Family, names: Any, experts: set[str], tensor_type: TensorType
) -> Iterator[Planted]:
    """Tensors of no routed expert."""
    layout = checkpoint.layout
    for name, info in checkpoint.tensors.items():
        if name in experts:
            continue
        stock = stock_name(layout, name).replace("e_score_correction_bias", "e_score_correction.bias")
        if is_latent(config) and stock.endswith("self_attn.kv_b_proj.weight"):
            yield from _latent(name, layout.layer(name), config, _kind(info.dtype, info.shape[-1], tensor_type))
            continue
        known = names.get_name(stock, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UnsupportedModel(
                f"llama.cpp's {family.architecture.lower()} has no tensor for {name}",
                file=checkpoint.path,
                layer=layout.layer(name),
                hint="--to compressed-tensors and --to auto-round keep all tensors",
            )
        wide = len(info.shape) < 2 or "ffn_gate_inp" in known
        kind = "F32" if wide else _kind(info.dtype, info.shape[-1], tensor_type)
        heads = _heads(stock, config) if family.interleaved else 0
        yield Planted(known, kind, _shape(info.shape, known), _reader(name, kind, heads))


def _latent(name: str, layer: int | None, config: Any, kind: str) -> Iterator[Planted]:
    """The matrix that spreads latents over heads, in its two parts."""

    def part(index: int, held: str) -> Callable[[TensorReader], Bytes]:
        return lambda reader: as_bytes(latent_parts(reader.read(name), config)[index], held, name)

    for index, (which, shape) in enumerate(zip("kv", latent_shapes(config), strict=True)):
        # Blocks of 32 may not fit the keys' part, whose rows are as long as a head is wide.
        held = "F16" if kind == "Q8_0" and shape[-1] % gguf_blocks.BLOCK else kind
        yield Planted(f"blk.{layer}.attn_{which}_b.weight", held, shape, part(index, held))


def _shape(shape: tuple[int, ...], known: str) -> tuple[int, ...]:
    """Gates of shared experts are vectors in GGUF."""
    return shape[-1:] if "ffn_gate_inp_shexp" in known else shape


def _heads(stock: str, config: Any) -> int:
    """Heads of query and key matrices, whose rows llama.cpp has in another order; 0 elsewhere."""
    if "self_attn.q_proj" in stock:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if "self_attn.k_proj" in stock else 0


def _reader(name: str, kind: str, heads: int) -> Callable[[TensorReader], Bytes]:
    def make(reader: TensorReader) -> Bytes:
        value = reader.read(name)
        return as_bytes(interleaved(value, heads) if heads else value, kind, name)

    return make


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves, as transformers turns them, to pairs, as llama.cpp's Llama does."""
    parts = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return parts.transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class Wanted:
    """What experts are to become: a type, k-quants after that, and whether rounded ones are k-quants, too."""

    tensor_type: TensorType
    k_quants: bool
    round_again: bool


def expert_tensors(matrices: list[ExpertMatrix], grids: Grids | None, wanted: Wanted) -> Iterator[Planted]:
    """One tensor for all experts of a layer and projection."""
    by_place: dict[tuple[int, str], list[ExpertMatrix]] = {}
    for matrix in sorted(matrices, key=lambda m: (m.layer, PARTS.index(m.part), m.expert)):
        by_place.setdefault((matrix.layer, matrix.part), []).append(matrix)
    for (layer, part), some in by_place.items():
        name = f"blk.{layer}.ffn_{part}_exps.weight"
        shape = (len(some), *some[0].shape)
        widths = [None if grids is None else grids.of(m.layer, m.part, m.expert) for m in some]
        rounded = [bits for bits in widths if bits is not None]
        floats = _kind(some[0].source.dtype, shape[-1], wanted.tensor_type)
        if wanted.k_quants:
            gguf_kquants.check_columns(name, layer, shape[-1])
        if grids is None or len(rounded) < len(some):
            yield Planted(name, floats, shape, _stack(some, floats), experts=True)
        elif grids.symmetric and gguf_blocks.fits(shape[-1], grids.group) and not wanted.round_again:
            kind = gguf_blocks.narrowest(max(rounded))
            planned = [Planned(matrix, bits) for matrix, bits in zip(some, rounded, strict=True)]
            final = kind if wanted.k_quants else None
            yield Planted(name, kind, shape, _blocks(planned, kind, grids.group), experts=True, final=final)
        elif wanted.k_quants:
            final = gguf_kquants.OF_BITS[max(rounded)]
            yield Planted(name, floats, shape, _stack(some, floats), experts=True, final=final)
        elif wanted.tensor_type != "auto":
            yield Planted(name, floats, shape, _stack(some, floats), experts=True)
        else:
            raise _unheld(layer, part, shape[-1], grids)


def _unheld(layer: int, part: str, columns: int, grids: Grids) -> BadConfig:
    what = (
        f"groups of {grids.group or columns} of {columns} inputs, and GGUF's blocks are {gguf_blocks.BLOCK} long"
        if grids.symmetric
        else "zero points, which GGUF's blocks of whole numbers do not have"
    )
    return BadConfig(
        f"the {part} projections were rounded with {what}",
        layer=layer,
        hint="round them again with --set symmetric=true --set group=32 (or 64, 128), or write floats (--type bf16)",
    )


def _stack(some: list[ExpertMatrix], kind: str) -> Callable[[TensorReader], Bytes]:
    return lambda reader: np.stack([as_bytes(matrix.read(reader), kind, matrix.name) for matrix in some])


def _blocks(some: list[Planned], kind: str, group: int) -> Callable[[TensorReader], Bytes]:
    return lambda reader: np.stack([gguf_blocks.packed(recovered(entry, reader, group), kind) for entry in some])


def _kind(stored: str, columns: int, tensor_type: TensorType) -> str:
    """Rows that do not come in blocks are written in float16, as llama.cpp's own tools do."""
    if tensor_type == "auto":
        return stored if stored in _ITEM_BYTES else "F32"
    if tensor_type == "q8_0" and columns % gguf_blocks.BLOCK:
        return "F16"
    return tensor_type.upper()


def as_bytes(value: Tensor, kind: str, name: str = "the tensor") -> Bytes:
    """A tensor's bytes in a kind, a row of bytes for each row.

    Raises:
        NumericFault: it holds NaN, or numbers beyond what the kind holds; says where.
    """
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    made = value.to(dtype)
    if not bool(made.isfinite().all()):
        layer, expert = where(name)
        damaged = not bool(value.isfinite().all())
        raise NumericFault(
            f"{name} holds NaN or infinity" if damaged else f"{name} holds numbers beyond what {kind} holds",
            layer=layer,
            expert=expert,
            hint="see `moekit check`" if damaged else "choose a wider type (--type bf16)",
        )
    if kind == "Q8_0":
        gguf = package()
        blocks: Bytes = gguf.quants.quantize(made.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return blocks
    flat: Bytes = made.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(*value.shape[:-1], -1)
