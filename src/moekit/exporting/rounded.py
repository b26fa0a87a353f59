"""What a folder's record says of its rounded experts, held against what a format can hold; and the experts themselves.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.quantized.registry import kind, quantization
from moekit.checkpoint.reading import TensorReader
from moekit.checkpoint.record import Record
from moekit.compress.engine.grids import Grids, read_grids
from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.exporting.matrices import ExpertMatrix, expert_matrices
from moekit.exporting.recovery import Recovered, recover

# How far back a record is looked for that tells of grids.
_GENERATIONS = 16
_AGAIN = "moekit quantize MODEL --method gptq --bits 4 --set symmetric=true"
_WHOLE = "write whole matrices first, in Python: moekit.save(moekit.load('...', parts=False), 'whole')"
_WITHOUT = (
    "export the folder that it was attached to (moekit undo); after mone or merging, prune or merge again "
    "so that stock transformers routes (mone: --set operator=drop; merging: --set router=representative)"
)


def refuse_unpackable(checkpoint: Checkpoint) -> None:
    """Refuse a folder that is in a packed form already, or that more than its weights belongs to.

    Raises:
        UnsupportedModel: names the form, or the runtime part, which no engine would run.
    """
    settings = quantization(checkpoint.config)
    if settings is not None:
        raise UnsupportedModel(
            f"the weights are packed already ({kind(settings)})",
            file=checkpoint.path,
            hint="give the folder that it was made from, whose weights are floats",
        )
    parts = [] if checkpoint.record is None else checkpoint.record.parts
    if parts:
        raise UnsupportedModel(
            f"the folder computes with {parts[0].kind} {parts[0].name!r}, which engines do not know: without it the "
            "model is another one",
            file=checkpoint.path,
            hint=_WHOLE if parts[0].name == "factored" else _WITHOUT,
        )


def grids_of(checkpoint: Checkpoint) -> Grids | None:
    """The grids that a folder's record tells of, or its parents' where nothing says that experts changed since.

    Healing, routing and pruning leave the experts that stay as they are. Grids of a parent count where the first
    matrix lies on its own.

    Returns:
        None where the experts were not rounded, or not any more.
    """
    record, path = checkpoint.record, checkpoint.path
    kept: list[dict[str, list[int]]] = []
    for _ in range(_GENERATIONS):
        if record is None:
            return None
        grids = read_grids(record.scores, path)
        if grids is not None:
            for experts in reversed(kept):
                grids = grids.kept(experts)
            return grids if path == checkpoint.path or _begins_on(checkpoint, grids) else None
        kept.append(record.scores.get("kept") or {})
        if not record.parent or not Path(record.parent).is_dir():
            return None
        path = Path(record.parent)
        fingerprint, record = record.parent_fingerprint, Record.read(path)
        if record is not None and record.fingerprint != fingerprint:
            return None  # another checkpoint lies there now
    return None


def _begins_on(checkpoint: Checkpoint, grids: Grids) -> bool:
    """Whether the first matrix that was rounded lies on its grid still."""
    for some in expert_matrices(checkpoint).values():
        for matrix in some:
            bits = grids.of(matrix.layer, matrix.part, matrix.expert)
            if bits is not None:
                with TensorReader(checkpoint) as reader:
                    return not grids.symmetric or recover(matrix.read(reader), bits, grids.group) is not None
    return False


def symmetric_grids(checkpoint: Checkpoint, form: str) -> Grids:
    """The same where a form needs them.

    Args:
        checkpoint: the folder.
        form: what it is to be packed into, for messages.

    Raises:
        BadConfig: no expert was rounded, or zero is not the middle of the grids.
    """
    grids = grids_of(checkpoint)
    if grids is None:
        raise BadConfig(
            f"the record says of no grids that the experts lie on, and {form} holds whole numbers",
            file=checkpoint.path,
            hint=f"round them as the last step ({_AGAIN}), or write --to gguf, which holds floats, too",
        )
    if not grids.symmetric:
        raise BadConfig(
            f"the experts were rounded with zero points, which engines do not read in experts that lie in {form}",
            file=checkpoint.path,
            hint=f"round them again, with --set symmetric=true ({_AGAIN})",
        )
    return grids


@dataclass(frozen=True)
class Planned:
    """A matrix and its bits."""

    matrix: ExpertMatrix
    bits: int


def planned(matrices: Iterable[ExpertMatrix], grids: Grids, form: str) -> list[Planned]:
    """Matrices with the bits that they were rounded to.

    Raises:
        BadConfig: one was not.
    """
    found = []
    for matrix in matrices:
        bits = grids.of(matrix.layer, matrix.part, matrix.expert)
        if bits is None:
            raise BadConfig(
                f"the {matrix.part} projection was not rounded, and {form} packs all matrices of the experts",
                layer=matrix.layer,
                expert=matrix.expert,
                hint="give bits for all parts (--bits 4); multi-token-prediction layers are never rounded: prune them "
                "away (moekit prune --mtp drop) or write --to gguf",
            )
        found.append(Planned(matrix, bits))
    return found


def recovered(planned: Planned, reader: TensorReader, group: int) -> Recovered:
    """A matrix as whole numbers and scales that give back the stored weights bit for bit.

    Raises:
        NumericFault: it does not lie on its grid; names layer and expert.
    """
    weights_RC: Tensor = planned.matrix.read(reader)
    found = recover(weights_RC, planned.bits, group)
    if found is None or not bool((found.weights(weights_RC.dtype) == weights_RC).all()):
        raise NumericFault(
            f"the {planned.matrix.part} projection does not lie on the grid of {planned.bits} bits in groups of "
            f"{group or planned.matrix.shape[1]} that the record tells of",
            layer=planned.matrix.layer,
            expert=planned.matrix.expert,
            hint="weights were changed after they were rounded: quantize as the last step before the export",
        )
    return found
