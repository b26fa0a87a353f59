"""Write a folder whose experts are packed: matrix by matrix, all other tensors byte for byte, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moekit._progress import Progress
from moekit.checkpoint.folder import CONFIG_FILE, Checkpoint, read_tensors
from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.names import where
from moekit.checkpoint.reading import TensorReader
from moekit.checkpoint.record import TensorExpectation
from moekit.checkpoint.shards import DEFAULT_SHARD_BYTES
from moekit.checkpoint.small_files import copy_small_files
from moekit.compress.engine.grids import Grids
from moekit.compress.engine.shard_writer import OutputShards, Spec, lay_out
from moekit.errors import BadCheckpoint, NumericFault
from moekit.exporting.form import Form
from moekit.exporting.matrices import ExpertMatrix, expert_matrices, stock_name
from moekit.exporting.rounded import Planned, planned, recovered, refuse_unpackable, symmetric_grids

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass
class PackedFolder:
    """A folder to come.

    Attributes:
        checkpoint: the source.
        form: what its experts become.
        grids: that they lie on.
        plan: every matrix of them.
        spared: matrices of layers that were not rounded, which stay as they are.
        copied: name in the output -> tensor of the source.
        nbytes: of all tensors.
    """

    checkpoint: Checkpoint
    form: Form
    grids: Grids
    plan: list[Planned]
    copied: dict[str, TensorInfo]
    spared: list[ExpertMatrix] = field(default_factory=list)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(spec.nbytes for spec in self.specs())

    def specs(self) -> list[Spec]:
        """All tensors of the output."""
        packed = [spec for entry in self.plan for spec in self.form.specs(entry, self.grids)]
        whole = [Spec(f"{matrix.name}.weight", matrix.source.dtype, matrix.shape) for matrix in self.spared]
        return [*(Spec(name, info.dtype, info.shape) for name, info in self.copied.items()), *packed, *whole]

    @property
    def readable(self) -> bool:
        """Whether moekit reads back what the form holds: names and widths that it knows."""
        return self.form.readable(self.plan)

    @property
    def expert_bytes(self) -> int:
        """Of all experts."""
        whole = sum(Spec(matrix.name, matrix.source.dtype, matrix.shape).nbytes for matrix in self.spared)
        return whole + sum(spec.nbytes for entry in self.plan for spec in self.form.specs(entry, self.grids))


def prepare(checkpoint: Checkpoint, form: Form) -> PackedFolder:
    """Look at what is to be packed, from headers and the record alone.

    Raises:
        BadConfig: the experts were not rounded, not symmetrically, or to widths that the form does not hold.
        UnsupportedModel: packed already, runtime parts, or experts that have no names of their own.
    """
    refuse_unpackable(checkpoint)
    grids = symmetric_grids(checkpoint, form.name)
    found = expert_matrices(checkpoint)
    matrices = [matrix for some in found.values() for matrix in some]
    spared = _spared(matrices, grids) if form.spares else []
    left = {matrix.layer for matrix in spared}
    plan = planned((matrix for matrix in matrices if matrix.layer not in left), grids, form.name)
    form.check(plan, spared, grids)
    layout = checkpoint.layout
    copied = {
        stock_name(layout, name) if form.renames else name: info
        for name, info in checkpoint.tensors.items()
        if name not in found
    }
    return PackedFolder(checkpoint, form, grids, plan, copied, spared)


def _spared(matrices: Sequence[ExpertMatrix], grids: Grids) -> list[ExpertMatrix]:
    """Matrices of layers of which none was rounded, where others were."""
    rounded = {m.layer for m in matrices if grids.of(m.layer, m.part, m.expert) is not None}
    return [matrix for matrix in matrices if rounded and matrix.layer not in rounded]


def write(work: PackedFolder, folder: Path, progress: Progress | None = None) -> dict[str, TensorExpectation]:
    """Write config, small files and shards into a folder that is there.

    Memory is one matrix and a few buffers.

    Returns:
        The digests of all tensors.

    Raises:
        NumericFault: a matrix does not lie on its grid, or what was packed does not give it back.
        BadCheckpoint: an expert's tensor is left in floats.
    """
    copy_small_files(work.checkpoint.path, folder)
    config = dict(work.checkpoint.config)
    config["quantization_config"] = work.form.config(work.plan, work.spared, work.grids, work.checkpoint)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    shards, index = lay_out(work.specs(), DEFAULT_SHARD_BYTES)
    if progress is not None:
        progress.start("packing", work.nbytes)
    try:
        advance = progress.advance if progress else None
        with OutputShards(folder, shards, index, advance) as output, TensorReader(work.checkpoint) as reader:
            for name, info in work.copied.items():
                output.copy(name, work.checkpoint.path / info.shard, [info.offsets])
            for entry in work.plan:
                for name, tensor in _packed(work, entry, reader).items():
                    output.put(name, _bytes(tensor))
            for matrix in work.spared:
                output.put(f"{matrix.name}.weight", _bytes(matrix.read(reader)))
            digests = output.digests()
    finally:
        if progress is not None:
            progress.finish()
    refuse_float_experts(folder, work.plan)
    return digests


def _packed(work: PackedFolder, entry: Planned, reader: TensorReader) -> dict[str, Tensor]:
    """A matrix's tensors, taken apart again and compared before they are written."""
    found = recovered(entry, reader, work.grids.group)
    made = work.form.pack(entry, found)
    again = work.form.unpack(entry, made)
    if not (torch.equal(again.numbers_RC, found.numbers_RC) and torch.equal(again.scale_RG, found.scale_RG)):
        raise NumericFault(
            f"the {entry.matrix.part} projection does not come back out of {work.form.name} as it went in",
            layer=entry.matrix.layer,
            expert=entry.matrix.expert,
            hint="a fault of moekit: please report it",
        )
    return made


def refuse_float_experts(folder: Path, plan: Sequence[Planned]) -> None:
    """Refuse a folder in which a matrix of an expert is left in floats, or not there.

    Raises:
        BadCheckpoint: names it.
    """
    tensors = read_tensors(folder)
    stems = {entry.matrix.name for entry in plan} | {entry.matrix.source.name.removesuffix(".weight") for entry in plan}
    for name, info in tensors.items():
        whole = name in stems or name.removesuffix(".weight") in stems
        if whole and info.dtype in _FLOATS:
            layer, expert = where(name)
            raise BadCheckpoint(f"{name} is left in {info.dtype}", file=folder / info.shard, layer=layer, expert=expert)


def _bytes(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view
