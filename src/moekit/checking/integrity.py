"""Is every byte what the record says, and if not, what happened to it?

A digest that does not match is compared with all other digests of the record, so that experts that were swapped or
copied, projections that were exchanged and whole foreign shards are called by their name.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch

from moekit.anatomy.probe import Geometry
from moekit.checking.report import Finding
from moekit.checking.scan import TensorScan
from moekit.checking.units import Unit, place_of, read_unit, swap_halves, unit_digests, units_of
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import RECORD_FILE, TensorExpectation
from moekit.checkpoint.safety import TensorInfo

# From this share of changed tensors on, a shard is called foreign as a whole.
_FOREIGN_SHARE = 0.8
_HINT = "restore it from a copy, or make the checkpoint again from its parent (moekit undo)"


def _sha256(matrix: torch.Tensor) -> str:
    return hashlib.sha256(matrix.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


class Integrity:
    """Compares one scanned checkpoint with its record."""

    def __init__(
        self, checkpoint: Checkpoint, scans: Mapping[str, TensorScan], geometries: Mapping[int, Geometry] | None = None
    ):
        assert checkpoint.record is not None
        self.checkpoint = checkpoint
        self.scans = scans
        self.geometries = geometries or {}
        self.expected: dict[str, TensorExpectation] = checkpoint.record.expectations.tensors
        self.homes: dict[str, list[Unit]] = defaultdict(list)
        self.digests: dict[Unit, str] = {}
        for name, expectation in self.expected.items():
            for unit, digest in self._recorded(name, expectation):
                self.homes[digest].append(unit)
                self.digests[unit] = digest

    def _recorded(self, name: str, expectation: TensorExpectation) -> Iterator[tuple[Unit, str]]:
        digests = expectation.experts or [expectation.sha256]
        # Only name and number of slices matter for naming units; the tensor itself may be gone.
        count = len(digests)
        units = units_of(TensorInfo(name, "", "U8", (count, 1), (0, count)))
        if len(units) == len(digests):
            yield from zip(units, digests, strict=True)

    def findings(self) -> Iterator[Finding]:
        """Everything that is not as recorded."""
        if not self.expected:
            yield self._find("warning", "no-digests", "the record holds no digests to compare with", None)
            return
        if not set(self.expected) & set(self.scans):
            yield self._find("error", "other-layout", "the record describes tensors of other names", None)
            return
        yield from self._presence()
        changed = list(self._changed())
        foreign = self._foreign_shards(changed)
        for shard in sorted(foreign):
            message = "nearly no tensor in this shard is the recorded one: it is a shard of another model"
            yield self._find("error", "foreign-shard", message, shard)
        yield from self._explain([unit for unit in changed if self.checkpoint.tensors[unit.name].shard not in foreign])

    def _find(self, severity: str, code: str, message: str, shard: str | None, **place: int | None) -> Finding:
        file = self.checkpoint.path / shard if shard else self.checkpoint.path / RECORD_FILE
        return Finding.model_validate(
            {"severity": severity, "code": code, "message": message, "file": str(file), "hint": _HINT, **place}
        )

    def _presence(self) -> Iterator[Finding]:
        for name in sorted(set(self.expected) - set(self.scans)):
            layer, expert = self.checkpoint.where(name)
            message = f"the record has {name}, the folder has not"
            yield self._find("error", "missing-tensor", message, None, layer=layer, expert=expert)
        for name in sorted(set(self.scans) - set(self.expected)):
            layer, expert = self.checkpoint.where(name)
            message = f"{name} is not in the record"
            yield self._find(
                "error", "surplus-tensor", message, self.scans[name].info.shard, layer=layer, expert=expert
            )

    def _changed(self) -> Iterator[Unit]:
        for name, scan in self.scans.items():
            expectation = self.expected.get(name)
            if expectation is None or expectation.sha256 == scan.sha256:
                continue
            found = unit_digests(scan)
            for unit in units_of(scan.info):
                if unit not in found or found[unit] != self.digests.get(unit):
                    yield unit

    def _foreign_shards(self, changed: list[Unit]) -> set[str]:
        total: dict[str, int] = defaultdict(int)
        strange: dict[str, int] = defaultdict(int)
        for scan in self.scans.values():
            total[scan.info.shard] += len(units_of(scan.info))
        for unit in changed:
            if not self._home(unit):
                strange[self.checkpoint.tensors[unit.name].shard] += 1
        return {shard for shard, count in strange.items() if count >= 3 and count >= _FOREIGN_SHARE * total[shard]}

    def _home(self, unit: Unit) -> list[Unit]:
        """Units of the record that hold what this unit holds now."""
        found = unit_digests(self.scans[unit.name]).get(unit)
        return self.homes.get(found, []) if found else []

    def _explain(self, changed: list[Unit]) -> Iterator[Finding]:
        moves: dict[tuple[str, int | None], dict[int, dict[int, list[str]]]] = defaultdict(lambda: defaultdict(dict))
        for unit in changed:
            other = self._other_expert(unit)
            if other is None or unit.expert is None:
                yield self._explain_one(unit)
            else:
                layer = place_of(self.checkpoint, unit)[0]
                moves[unit.block, layer][unit.expert].setdefault(other, []).append(unit.part)
        for (_, layer), experts in moves.items():
            yield from self._explain_moves(layer, experts)

    def _other_expert(self, unit: Unit) -> int | None:
        """The expert of the same layer whose same part this unit holds now."""
        for home in self._home(unit):
            if home.block == unit.block and home.part == unit.part and home.expert != unit.expert:
                return home.expert
        return None

    def _explain_moves(self, layer: int | None, experts: Mapping[int, Mapping[int, list[str]]]) -> Iterator[Finding]:
        for expert, sources in sorted(experts.items()):
            for source, parts in sorted(sources.items()):
                swapped = expert in experts.get(source, {})
                if swapped and source < expert:
                    continue  # told with the other one
                what = (
                    f"experts {expert} and {source} are swapped in this layer"
                    if swapped
                    else f"expert {expert} holds what the record has for expert {source}"
                )
                code = "experts-swapped" if swapped else "expert-replaced"
                message = f"{what} ({', '.join(sorted(parts))})"
                yield self._find("error", code, message, None, layer=layer, expert=expert)

    def _explain_one(self, unit: Unit) -> Finding:
        layer, expert = place_of(self.checkpoint, unit)
        code, message = self._cause(unit)
        shard = self.checkpoint.tensors[unit.name].shard
        return self._find("error", code, message, shard, layer=layer, expert=expert)

    def _cause(self, unit: Unit) -> tuple[str, str]:
        info, expectation = self.checkpoint.tensors[unit.name], self.expected[unit.name]
        homes = self._home(unit)
        if any(home.block == unit.block and home.expert == unit.expert and unit.block for home in homes):
            part = next(home.part for home in homes if home.block == unit.block and home.expert == unit.expert)
            return "gate-up-swapped", f"{unit.name} holds what the record has for the {part} projection of this expert"
        if homes:
            home = homes[0]
            return "tensor-moved", f"{unit.name} holds what the record has as {home.name}"
        if info.dtype != expectation.dtype:
            return "dtype", f"{unit.name} is {info.dtype}, recorded was {expectation.dtype}"
        matrix = read_unit(self.checkpoint, unit)
        wanted = self.digests.get(unit)
        if matrix is not None and matrix.dim() == 2 and _sha256(matrix.T) == wanted:
            return "transposed", f"{unit.name} is the transposed of what was recorded"
        if matrix is not None and unit.part.startswith("gate_up"):
            layer = place_of(self.checkpoint, unit)[0]
            swapped = swap_halves(matrix, self.geometries.get(-1 if layer is None else layer))
            if swapped is not None and _sha256(swapped) == wanted:
                return "gate-up-swapped", f"gate and up halves of {unit.name} are swapped"
        if list(info.shape) != expectation.shape:
            return "shape", f"{unit.name} is {list(info.shape)}, recorded was {expectation.shape}"
        return "changed", f"{unit.name} is not what was recorded"
