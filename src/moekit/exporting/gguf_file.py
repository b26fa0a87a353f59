"""A GGUF file for llama.cpp, written tensor by tensor.

Experts that lie on symmetric grids become blocks of whole numbers (`gguf_blocks`): the file computes the products that
the folder holds, before the folder's dtype rounded them. All other matrices are written as they are stored or in a type
that is asked for; vectors and routers in float32, as llama.cpp wants them.

Legend: E experts, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moekit._progress import Progress
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.meta import meta_model
from moekit.checkpoint.reading import TensorReader
from moekit.checkpoint.uneven import uneven_counts
from moekit.errors import UnsupportedModel
from moekit.exporting import gguf_kquants
from moekit.exporting.gguf_families import Family, add_sizes, family_of
from moekit.exporting.gguf_kquants import KQUANTS, TensorType
from moekit.exporting.gguf_tensors import Planted, Wanted, expert_tensors, other_tensors, package, tensor_names
from moekit.exporting.gguf_tokenizer import add_tokenizer
from moekit.exporting.matrices import expert_matrices
from moekit.exporting.rounded import grids_of, refuse_unpackable

FILE = "model.gguf"


@dataclass
class GgufFile:
    """A file to come.

    Attributes:
        checkpoint: the source.
        config: its config.
        family: of it.
        tensors: in the order of the file.
        k_quant: what llama.cpp makes of it afterwards; None where it stays as it is written.
    """

    checkpoint: Checkpoint
    config: Any
    family: Family
    tensors: list[Planted]
    k_quant: str | None = None

    @property
    def overrides(self) -> dict[str, str]:
        """Types that llama.cpp is told to give to single tensors."""
        return {tensor.name: tensor.final for tensor in self.tensors if tensor.final is not None}

    @property
    def nbytes(self) -> int:
        """Of all tensors, before llama.cpp rounds them."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def expert_bytes(self) -> int:
        """Of experts."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.experts)

    @property
    def kinds(self) -> dict[str, int]:
        """How many tensors of experts are of which kind."""
        return dict(Counter(tensor.kind for tensor in self.tensors if tensor.experts))


def prepare(checkpoint: Checkpoint, tensor_type: TensorType = "auto", *, round_again: bool = False) -> GgufFile:
    """Look at what is to be written, from headers, config and record alone.

    Args:
        checkpoint: the source, not packed.
        tensor_type: of matrices that are not rounded; auto as they are stored.
        round_again: let rounded experts become k-quants of their bits, too.

    Raises:
        BadConfig: grids that GGUF's blocks do not hold.
        UnsupportedModel: a family or tensor that llama.cpp does not know, packed weights, runtime parts, layers of
            different numbers of experts, or no package gguf.
    """
    k_quant = tensor_type if tensor_type in KQUANTS else None
    if k_quant is not None:
        gguf_kquants.check_installed()
        tensor_type = "auto"
    refuse_unpackable(checkpoint)
    config = meta_model(checkpoint).config
    family = family_of(config, checkpoint.path)
    _refuse_uneven(checkpoint)
    names = tensor_names(family, config)
    found = expert_matrices(checkpoint)
    tensors = list(other_tensors(checkpoint, config, family, names, set(found), tensor_type))
    matrices = [matrix for some in found.values() for matrix in some]
    grids = grids_of(checkpoint)
    tensors += expert_tensors(matrices, grids, Wanted(tensor_type, k_quant is not None, round_again))
    return GgufFile(checkpoint, config, family, tensors, k_quant)


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


def _file_type(gguf: Any, work: GgufFile) -> Any:
    """What most of the file is: the commonest kind of its matrices."""
    size: Counter[str] = Counter()
    for tensor in work.tensors:
        size[tensor.kind] += tensor.nbytes
    kind = size.most_common(1)[0][0]
    return gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType[f"MOSTLY_{kind}"]
