"""Is what has stayed byte for byte what the parent holds, expert by expert, whichever way both keep them on disk?

Both checkpoints are compared by SHA-256. Where one stacks experts and the other keeps them apart, the matrices are
brought into one form first: gate, up and down of one expert each.

Legend: E experts, I expert width, H hidden.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moekit._progress import Progress
from moekit.anatomy.probe import Geometry
from moekit.checking.report import Finding
from moekit.checking.samples import layer_key, shown
from moekit.checking.scan import TensorScan
from moekit.checking.units import Unit, read_unit, unit_digests, units_of
from moekit.checkpoint.digest import read_range, tensor_digests
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import TensorExpectation
from moekit.checkpoint.safety import DTYPE_BITS, TensorInfo
from moekit.compress.engine.slicing import expert_counts
from moekit.errors import MoekitError

# (expert, part) -> SHA-256
Digests = dict[tuple[int, str], str]
_HINT = "take it from the parent again, or make the checkpoint again"


@dataclass(frozen=True)
class Difference:
    """A matrix of an expert that is not its counterpart's.

    Attributes:
        expert: of the child.
        part: such as "gate".
        name: tensor of the child that holds it.
        home: which expert and part of the parent it is instead, if any.
    """

    expert: int
    part: str
    name: str
    home: tuple[int, str] | None


class ParentBytes:
    """Two checkpoints by their bytes.

    Args:
        child: what is checked.
        parent: what it was made from.
        scans: of all tensors of the child.
        geometries: decoder layer -> sizes of the child's blocks, which say how stacked matrices are arranged.
        progress: told how much of the parent is read.
    """

    def __init__(
        self,
        child: Checkpoint,
        parent: Checkpoint,
        scans: Mapping[str, TensorScan],
        geometries: Mapping[int, Geometry],
        progress: Progress | None = None,
    ) -> None:
        self.child, self.parent = child, parent
        self._scans = scans
        self._geometries = geometries
        self._progress = progress
        self._ours, self._theirs = _by_layer(child), _by_layer(parent)

    @cached_property
    def _digests(self) -> dict[str, TensorExpectation]:
        return tensor_digests(
            self.parent.path, self.parent.tensors.values(), progress=self._progress, label="reading the parent"
        )

    def differing(self, layer: int, expected: Sequence[int]) -> list[Difference] | None:
        """Matrices of a layer's experts that are not the parent's; None where they cannot be compared.

        Args:
            layer: as `samples.layer_key` counts them.
            expected: for each expert of the child the parent's that it should be.
        """
        pair = self._pair(layer)
        if pair is None:
            return None
        ours, theirs = pair
        if any(expert >= len(expected) for expert, _ in ours):
            return None
        homes = {digest: place for place, digest in reversed(theirs.items())}
        found = []
        for (expert, part), digest in ours.items():
            if theirs.get((expected[expert], part)) != digest:
                name = self._name(layer, expert, part)
                found.append(Difference(expert, part, name, homes.get(digest)))
        return sorted(found, key=lambda d: (d.expert, d.part))

    def _pair(self, layer: int) -> tuple[Digests, Digests] | None:
        """Both sides' digests of a layer, in one form."""
        ours, theirs = self._ours[layer], self._theirs[layer]
        kinds = [{part for _, part in side} for side in (ours, theirs)]
        if kinds[0] == kinds[1]:
            mine, other = self._scanned(ours), self._hashed(theirs)
            return None if mine is None or other is None else (mine, other)
        if any("." in part for kind in kinds for part in kind):
            return None  # scales, biases: only plain weights are brought into one form
        geometry = self._geometries.get(shown(layer)) or next(iter(self._geometries.values()), None)
        ours_apart, theirs_apart = _split(self.child, ours, geometry), _split(self.parent, theirs, geometry)
        return None if ours_apart is None or theirs_apart is None else (ours_apart, theirs_apart)

    def _scanned(self, units: Mapping[tuple[int, str], Unit]) -> Digests | None:
        found = {place: unit_digests(self._scans[unit.name]).get(unit) for place, unit in units.items()}
        whole = {place: digest for place, digest in found.items() if digest is not None}
        return whole if len(whole) == len(units) else None

    def _hashed(self, units: Mapping[tuple[int, str], Unit]) -> Digests:
        found = {}
        for place, unit in units.items():
            told = self._digests[unit.name]
            found[place] = told.sha256 if unit.slice is None or told.experts is None else told.experts[unit.slice]
        return found

    def _name(self, layer: int, expert: int, part: str) -> str:
        units = self._ours[layer]
        unit = units.get((expert, part)) or units.get((expert, "gate_up")) or next(iter(units.values()))
        return unit.name

    def rest(self, kept: Mapping[int, Sequence[int]], routers: set[str]) -> tuple[list[str], list[str], list[str]]:
        """Tensors outside of experts that both have: those compared, those that differ, and routers that differ.

        Args:
            kept: layer -> which of the parent's experts each one is.
            routers: names of the child's tensors that count experts.
        """
        compared: list[str] = []
        changed: list[str] = []
        moved: list[str] = []
        for name, info in self.child.tensors.items():
            other = self.parent.tensors.get(name)
            if other is None or units_of(info)[0].expert is not None or info.dtype != other.dtype:
                continue
            rows = kept.get(self._layer(name))
            equal = info.shape == other.shape and self._scans[name].sha256 == self._digests[name].sha256
            if name in routers or (rows is not None and info.shape != other.shape):
                # Of the same size although experts went: it counts none of them.
                counts = rows is not None and (info.shape != other.shape or len(rows) in info.shape)
                if not (self._same_rows(info, other, rows or ()) if counts else equal):
                    moved.append(name)
            elif info.shape == other.shape:
                compared.append(name)
                changed += [] if equal else [name]
        return compared, changed, moved

    def _same_rows(self, info: TensorInfo, other: TensorInfo, rows: Sequence[int]) -> bool:
        """Whether a tensor is made of these parts of the parent's, along the one axis that counts experts.

        An expert may have several neighbouring entries of the axis, and entries behind all experts stay.
        """
        if len(info.shape) != len(other.shape) or DTYPE_BITS[info.dtype] % 8:
            return False
        differs = [n for n, (a, b) in enumerate(zip(info.shape, other.shape, strict=True)) if a != b]
        axis = differs[0] if differs else next((n for n, size in enumerate(info.shape) if size == len(rows)), None)
        if axis is None:  # it counts no experts, and is not the same
            return False
        entries = self._entries(info.shape[axis], other.shape[axis], rows, self._layer(info.name))
        if len(differs) > 1 or entries is None:
            return False
        mine, theirs = (
            torch.from_numpy(read_range(side.path / one.shard, one.offsets)).view(*one.shape, -1)
            for side, one in ((self.child, info), (self.parent, other))
        )
        return torch.equal(mine, theirs.index_select(axis, torch.tensor(entries)))

    def _entries(self, ours: int, theirs: int, rows: Sequence[int], layer: int) -> list[int] | None:
        """Entries of the parent's axis that stay, in order; None where the sizes do not fit these experts."""
        if ours == theirs:
            return list(rows) if len(rows) == ours and sorted(rows) == list(range(ours)) else None
        experts = self._counts.get(shown(layer), theirs)
        gone = experts - len(rows)
        if gone < 1 or (theirs - ours) % gone or max(rows, default=0) >= experts:
            return None
        each = (theirs - ours) // gone
        tail = theirs - each * experts
        if tail < 0:
            return None
        parts = [expert * each + n for expert in rows for n in range(each)]
        return [*parts, *range(theirs - tail, theirs)]

    def _layer(self, name: str) -> int:
        """The layer of a tensor, as `samples.layer_key` counts them; -1 for tensors of none."""
        key = layer_key(self.child, name)
        return -1 if key is None else key

    @cached_property
    def _counts(self) -> dict[int, int]:
        """Decoder layer -> E of the parent."""
        try:
            return expert_counts(self.parent)
        except MoekitError:
            return {}


def _by_layer(checkpoint: Checkpoint) -> Mapping[int, Mapping[tuple[int, str], Unit]]:
    """Layer -> (expert, part) -> where it lies."""
    found: dict[int, dict[tuple[int, str], Unit]] = defaultdict(dict)
    for info in checkpoint.tensors.values():
        for unit in units_of(info):
            key = layer_key(checkpoint, unit.name)
            if unit.expert is not None and key is not None:
                found[key][unit.expert, unit.part] = unit
    return found


def _split(checkpoint: Checkpoint, units: Mapping[tuple[int, str], Unit], geometry: Geometry | None) -> Digests | None:
    """Digests of gate, up and down of each expert, each with a row for every output; None for unknown dtypes."""
    found: Digests = {}
    for (expert, part), unit in units.items():
        matrix = read_unit(checkpoint, unit)
        if matrix is None:
            return None
        stacked = unit.slice is not None
        if stacked and geometry is not None and geometry.transposed:
            matrix = matrix.T
        if part != "gate_up":
            found[expert, part] = _digest(matrix)
            continue
        together = geometry is None or geometry.concatenated
        gate, up = matrix.chunk(2) if together else (matrix[::2], matrix[1::2])
        found[expert, "gate"], found[expert, "up"] = _digest(gate), _digest(up)
    return found


def _digest(matrix: Tensor) -> str:
    told = f"{matrix.dtype} {tuple(matrix.shape)} ".encode()
    return hashlib.sha256(told + matrix.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def changed_experts(child: Checkpoint, layer: int, found: Sequence[Difference], expected: Sequence[int]) -> Finding:
    """The first expert that is not the parent's, although the record says that it stayed.

    Args:
        child: what is checked.
        layer: as `samples.layer_key` counts them.
        found: what differs, at least one.
        expected: for each expert the parent's that it should be.
    """
    first = found[0]
    code, message = "expert-changed", f"{first.name} ({first.part}) is not the parent's, byte for byte"
    if first.home is not None:
        source, part = first.home
        other = next((d for d in found if d.home == (expected[first.expert], first.part)), None)
        if source == expected[first.expert]:
            code, message = "gate-up-swapped", f"{first.name} ({first.part}) is the parent's {part} projection"
        elif other is not None and other.part == part == first.part:
            code, message = "experts-swapped", f"experts {first.expert} and {other.expert} are swapped ({part})"
        else:
            code, message = "expert-replaced", f"this is the parent's expert {source} ({part})"
    experts = len({difference.expert for difference in found})
    more = "" if experts == 1 else f"; the first of {experts} experts of this layer that differ"
    return Finding(
        severity="error",
        code=code,
        message=f"{message}, though the record says that it stayed as it was{more}",
        file=str(child.path),
        layer=shown(layer),
        expert=first.expert,
        hint=_HINT,
    )


def changed_rest(child: Checkpoint, changed: Sequence[str], *, claimed: bool, what: str) -> Iterator[Finding]:
    """The first tensor outside of experts that is not the parent's.

    Args:
        child: what is checked.
        changed: their names, in file order.
        claimed: whether the record says that they stayed.
        what: they are.
    """
    if not changed:
        return
    more = "" if len(changed) == 1 else f" (the first of {len(changed)} {what})"
    yield Finding(
        severity="error" if claimed else "note",
        code="changed-from-parent" if claimed else "differs-from-parent",
        message=f"{changed[0]} is not the parent's, byte for byte{more}"
        + (", though the record says that it stayed as it was" if claimed else ""),
        file=str(child.path / child.tensors[changed[0]].shard),
        layer=child.where(changed[0])[0],
        hint=_HINT if claimed else None,
    )
