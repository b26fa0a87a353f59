"""A GGUF file for llama.cpp, written tensor by tensor.

Experts that lie on symmetric grids become blocks of whole numbers (`gguf_blocks`): the file computes the products that
the folder holds, before the folder's dtype rounded them. All other matrices are written as they are stored or in a type
that is asked for; vectors and routers in float32, as llama.cpp wants them.

Legend: E experts, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moekit._progress import Progress
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.meta import meta_model
from moekit.checkpoint.names import where
from moekit.checkpoint.reading import TensorReader
from moekit.checkpoint.uneven import uneven_counts
from moekit.compress.engine.grids import Grids
from moekit.compress.engine.outcome import PARTS
from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.exporting import gguf_blocks
from moekit.exporting.gguf_blocks import Bytes
from moekit.exporting.gguf_families import Family, add_sizes, family_of
from moekit.exporting.gguf_tokenizer import add_tokenizer
from moekit.exporting.matrices import ExpertMatrix, expert_matrices, stock_name
from moekit.exporting.rounded import Planned, grids_of, recovered, refuse_unpackable

TensorType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
FILE = "model.gguf"
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
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[TensorReader], Bytes]
    experts: bool = False

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Sizes in bytes along the last axis."""
        return (*self.shape[:-1], row_bytes(self.kind, self.shape[-1]))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.byte_shape)


@dataclass
class GgufFile:
    """A file to come.

    Attributes:
        checkpoint: the source.
        config: its config.
        family: of it.
        tensors: in the order of the file.
        kinds: how many tensors of experts are of which kind.
    """

    checkpoint: Checkpoint
    config: Any
    family: Family
    tensors: list[Planted]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def expert_bytes(self) -> int:
        """Of experts."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.experts)

    @property
    def kinds(self) -> dict[str, int]:
        """How many tensors of experts are of which kind."""
        return dict(Counter(tensor.kind for tensor in self.tensors if tensor.experts))


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


def prepare(checkpoint: Checkpoint, tensor_type: TensorType = "auto") -> GgufFile:
    """Look at what is to be written, from headers, config and record alone.

    Args:
        checkpoint: the source, not packed.
        tensor_type: of matrices that are not rounded; auto as they are stored.

    Raises:
        BadConfig: grids that GGUF's blocks do not hold.
        UnsupportedModel: a family or tensor that llama.cpp does not know, packed weights, runtime parts, layers of
            different numbers of experts, or no package gguf.
    """
    refuse_unpackable(checkpoint)
    config = meta_model(checkpoint).config
    family = family_of(config, checkpoint.path)
    _refuse_uneven(checkpoint)
    names = _names(family, config)
    found = expert_matrices(checkpoint)
    tensors = list(_others(checkpoint, config, family, names, set(found), tensor_type))
    matrices = [matrix for some in found.values() for matrix in some]
    grids = grids_of(checkpoint)
    tensors += _experts(matrices, grids, tensor_type)
    return GgufFile(checkpoint, config, family, tensors)


def write(work: GgufFile, path: Path, progress: Progress | None = None) -> str:
    """Write the file; memory is one tensor of the output.

    Returns:
        What became of the tokenizer, for people.

    Raises:
        NumericFault: an expert does not lie on its grid, or a tensor holds NaN, or more than its type does.
    """
    gguf = package()
    architecture = getattr(gguf.MODEL_ARCH, work.family.architecture)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(work.checkpoint.path.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(gguf, work))
    add_sizes(writer, work.config, work.family)
    told = add_tokenizer(writer, work.checkpoint.path, int(work.config.vocab_size))
    for tensor in work.tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if progress is not None:
        progress.start("writing", work.nbytes)
    try:
        with TensorReader(work.checkpoint) as reader:
            for tensor in work.tensors:
                writer.write_tensor_data(tensor.make(reader))
                if progress is not None:
                    progress.advance(tensor.nbytes)
    finally:
        writer.close()
        if progress is not None:
            progress.finish()
    return told


def _refuse_uneven(checkpoint: Checkpoint) -> None:
    counts = uneven_counts(checkpoint)
    if counts:
        raise UnsupportedModel(
            f"layers hold {min(counts.values())} to {max(counts.values())} experts, and llama.cpp reads one number for "
            "all layers",
            file=checkpoint.path,
            hint="drop experts with --scope uniform, or --to auto-round, which moekit.load reads",
        )


def _names(family: Family, config: Any) -> Any:
    gguf = package()
    return gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.architecture), int(config.num_hidden_layers))


def _others(
    checkpoint: Checkpoint, config: Any, family: Family, names: Any, experts: set[str], tensor_type: TensorType
) -> Iterator[Planted]:
    """Tensors of no routed expert."""
    layout = checkpoint.layout
    for name, info in checkpoint.tensors.items():
        if name in experts:
            continue
        stock = stock_name(layout, name)
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


def _experts(matrices: list[ExpertMatrix], grids: Grids | None, tensor_type: TensorType) -> Iterator[Planted]:
    """One tensor for all experts of a layer and projection."""
    by_place: dict[tuple[int, str], list[ExpertMatrix]] = {}
    for matrix in sorted(matrices, key=lambda m: (m.layer, PARTS.index(m.part), m.expert)):
        by_place.setdefault((matrix.layer, matrix.part), []).append(matrix)
    for (layer, part), some in by_place.items():
        name = f"blk.{layer}.ffn_{part}_exps.weight"
        shape = (len(some), *some[0].shape)
        widths = [None if grids is None else grids.of(m.layer, m.part, m.expert) for m in some]
        rounded = [bits for bits in widths if bits is not None]
        if grids is None or len(rounded) < len(some):
            kind = _kind(some[0].source.dtype, shape[-1], tensor_type)
            yield Planted(name, kind, shape, _stack(some, kind), experts=True)
        elif grids.symmetric and gguf_blocks.fits(shape[-1], grids.group):
            kind = gguf_blocks.narrowest(max(rounded))
            planned = [Planned(matrix, bits) for matrix, bits in zip(some, rounded, strict=True)]
            yield Planted(name, kind, shape, _blocks(planned, kind, grids.group), experts=True)
        elif tensor_type != "auto":
            kind = _kind(some[0].source.dtype, shape[-1], tensor_type)
            yield Planted(name, kind, shape, _stack(some, kind), experts=True)
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


def _file_type(gguf: Any, work: GgufFile) -> Any:
    """What most of the file is: the commonest kind of its matrices."""
    size: Counter[str] = Counter()
    for tensor in work.tensors:
        size[tensor.kind] += tensor.nbytes
    kind = size.most_common(1)[0][0]
    return gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType[f"MOSTLY_{kind}"]
