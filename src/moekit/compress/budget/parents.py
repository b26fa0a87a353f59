"""How many weights the experts had before any were removed: the checkpoint's parents know, by their headers alone.

Legend: E experts, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moekit.anatomy.probe import Geometry, find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.skeleton import empty_model
from moekit.errors import BadConfig, MoekitError, UnsupportedModel

_HINT = "name the checkpoint that experts were removed from: --original DIR"


@dataclass(frozen=True)
class Original:
    """What a total sparsity is counted against.

    Attributes:
        path: of the checkpoint that no experts were removed from yet.
        weights: of its routed experts' matrices.
    """

    path: Path
    weights: int


def expert_weights(geometries: Mapping[int, Geometry]) -> int:
    """Entries of all routed experts' gate, up and down matrices."""
    return sum(g.experts * g.width * g.hidden * (3 if g.has_gate else 2) for g in geometries.values())


def find_original(checkpoint: Checkpoint, named: str | Path | None = None) -> Original:
    """The checkpoint that experts were removed from, in one step or in several; no weight is read.

    Records are followed from parent to parent, as long as those are the same model with as many experts or more.

    Args:
        checkpoint: what is left of it.
        named: where it lies; None to follow the records.

    Raises:
        BadConfig: a parent is gone, is not what it was, or `named` is another model.
    """
    left = _geometries(checkpoint)
    if named is not None:
        before = Checkpoint.open(named)
        found = _geometries(before)
        if not _is_of(left, found):
            raise BadConfig(
                f"{checkpoint.path} is not what is left of this model once experts were removed",
                file=before.path,
                hint="it must have the same layers and expert sizes, and at least as many experts in each",
            )
        return Original(before.path, expert_weights(found))
    seen = {checkpoint.path.resolve()}
    while (parent := _parent(checkpoint)) is not None and parent.path.resolve() not in seen:
        seen.add(parent.path.resolve())
        try:
            before_parent = _geometries(parent)
        except UnsupportedModel:  # the dense model that the first MoE was made from
            break
        if not _is_of(left, before_parent):
            break
        checkpoint, left = parent, before_parent
    return Original(checkpoint.path, expert_weights(left))


def _geometries(checkpoint: Checkpoint) -> dict[int, Geometry]:
    return {layer.index: layer.geometry for layer in find_moe_layers(empty_model(checkpoint))}


def _is_of(left: Mapping[int, Geometry], before: Mapping[int, Geometry]) -> bool:
    """Whether removing experts can lead from one to the other."""
    return left.keys() == before.keys() and all(
        (g.hidden, g.width, g.has_gate) == (b.hidden, b.width, b.has_gate) and g.experts <= b.experts
        for g, b in ((left[layer], before[layer]) for layer in left)
    )


def _parent(checkpoint: Checkpoint) -> Checkpoint | None:
    record = checkpoint.record
    if record is None or record.parent is None:
        return None
    try:
        parent = Checkpoint.open(record.parent, local_files_only=True)
    except MoekitError as error:
        raise BadConfig(
            f"its parent {record.parent} cannot be opened ({error.message}), so nothing says how many experts it had",
            file=checkpoint.path,
            hint=_HINT,
        ) from error
    if record.parent_fingerprint and parent.fingerprint != record.parent_fingerprint:
        raise BadConfig(f"its parent {record.parent} is no longer what it was", file=checkpoint.path, hint=_HINT)
    return parent
