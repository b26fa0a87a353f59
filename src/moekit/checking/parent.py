"""Is this still its parent? Compares every expert with the parent's experts by content, fine-tuned or not.

What is byte for byte the parent's is so, whether both keep experts in one layout or not; where the record says that it
stayed as it was, it has to be. What else differs is compared by likeness. Each matrix is represented by a sample of its
elements; the cosine of two samples is near one for the same matrix, high for a fine-tuned one, near zero for unrelated
ones. Experts that answer best to another expert of the parent were moved; that is legal if the router's rows moved with
them (a placement does so), and a silent error if they did not. A pruned child is compared with the experts that its
record says it kept, or else with those that its router's rows came from. A matrix of zeros, as right after a residual
conversion, says nothing.

Legend: E experts, P parent's experts, N sampled elements, H hidden.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from moekit._progress import Progress, track
from moekit.anatomy.probe import Geometry, MoELayer
from moekit.checking.claims import Claims, claims_of, rewrites
from moekit.checking.parent_bytes import ParentBytes, changed_experts, changed_rest
from moekit.checking.report import Finding
from moekit.checking.samples import RELATED, Side, matches, router_moves, sample, samples, shown, side_of
from moekit.checking.scan import TensorScan
from moekit.checking.units import Unit, read_unit, swap_halves
from moekit.checkpoint.expected import disk_names
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.layout import Layout
from moekit.checkpoint.names import text_config


@dataclass
class ParentCheck:
    """Compares the experts and routers of two checkpoints.

    Attributes:
        child: what is checked.
        parent: what it was made from, or another trusted version of it.
        layout: of the child.
        layers: MoE layers of the child's model.
        scans: of all tensors of the child.
        progress: told layer by layer.
        compared: decoder layers whose experts were compared.
        apart: whether there are layers that could not be compared.
        same: tensors outside of routed experts that are byte for byte the parent's.
    """

    child: Checkpoint
    parent: Checkpoint
    layout: Layout | None
    layers: list[MoELayer]
    scans: Mapping[str, TensorScan]
    progress: Progress | None = None
    compared: list[int] = field(default_factory=list)
    apart: bool = False
    same: list[str] = field(default_factory=list)

    @cached_property
    def _claims(self) -> Claims:
        return claims_of(self.child, self.parent)

    @cached_property
    def _bytes(self) -> ParentBytes:
        geometries = {layer.index: layer.geometry for layer in self.layers}
        return ParentBytes(self.child, self.parent, self.scans, geometries, self.progress)

    def findings(self) -> Iterator[Finding]:
        """Everything that is not the parent's: experts layer by layer, then what is outside of them."""
        yield from self._experts()
        yield from self._rest()

    def _experts(self) -> Iterator[Finding]:
        ours, theirs = side_of(self.child), side_of(self.parent)
        kinds = {text_config(side.config).get("model_type") for side in (self.child, self.parent)}
        both = sorted(ours.layers & theirs.layers)
        if not both or (len(kinds) > 1 and ours.units.keys() != theirs.units.keys()):
            yield self._note(f"{self.parent.path} keeps its experts in other layers or another layout: not compared")
            return
        for layer in sorted(ours.layers - set(both)):
            yield self._note("the parent has no experts in this layer", shown(layer))
        routers = router_moves(self.child, self.parent, self.layout, self.layers)
        for layer in track(both, "comparing with the parent", self.progress):
            yield from self._layer(ours, theirs, layer, routers.get(layer))

    def _layer(self, ours: Side, theirs: Side, layer: int, router: list[int] | None) -> Iterator[Finding]:
        """One layer: first by bytes, and where these differ, by likeness."""
        sizes = [{len(side.units[layer, part]) for part in side.parts(layer)} for side in (ours, theirs)]
        expected = self._expected(layer, sizes, router)
        if expected is None:
            yield self._note("the parent has another number of experts here: not compared", shown(layer))
            return
        differing, claimed = self._bytes.differing(layer, expected), self._claims.experts
        alike = ours.parts(layer) == theirs.parts(layer)
        if not alike and (differing is None or (differing and not claimed)):
            yield self._note("the parent's experts of this layer lie in another layout: not compared", shown(layer))
            return
        if alike and not claimed and _sizes(ours, layer) != _sizes(theirs, layer):
            yield self._note("experts here are narrower or wider than the parent's: not compared", shown(layer))
            return
        self.compared.append(layer)
        geometries = {layer.index: layer.geometry for layer in self.layers}
        found: list[Finding] = []
        if alike and differing != []:
            found += self._check_layer(ours, theirs, layer, expected, geometries.get(layer), router)
        elif not claimed:
            found += self._moved_rows(layer, router, expected)
        yield from found
        if differing and claimed and not any(finding.severity == "error" for finding in found):
            yield changed_experts(self.child, layer, differing, expected)

    def _rest(self) -> Iterator[Finding]:
        """Attention, norms, embeddings and routers, byte for byte."""
        claims, routers = self._claims, self._router_names()
        self.same, changed, moved = self._bytes.rest(claims.kept, routers)
        self.same = [name for name in self.same if name not in set(changed)]
        few = 2 * len(changed) < len(self.same)
        if claims.rest or few:
            what = "outside of routed experts that differ"
            yield from changed_rest(self.child, changed, claimed=claims.rest, what=what)
        if claims.experts:
            yield from changed_rest(self.child, moved, claimed=True, what="tensors of routers that differ")

    def _router_names(self) -> set[str]:
        """Tensors of the child that are a router's."""
        if self.layout is None:
            return set()
        stems = tuple(f"{layer.router_name}." for layer in self.layers if layer.router_name)
        return {name for live, name in disk_names(self.child.tensors, self.layout).items() if live.startswith(stems)}

    def _note(self, message: str, layer: int | None = None) -> Finding:
        self.apart = True
        return Finding(severity="note", code="not-comparable", message=message, file=str(self.child.path), layer=layer)

    def _expected(self, layer: int, sizes: list[set[int]], router: list[int] | None) -> list[int] | None:
        """For each expert the parent's that it should be; None where nobody knows."""
        if any(len(counts) > 1 for counts in sizes):
            return None
        mine, other = sizes[0].pop(), sizes[1].pop()
        recorded = list(self._claims.kept.get(layer) or ())
        if len(recorded) == mine and all(isinstance(e, int) and 0 <= e < other for e in recorded):
            return recorded
        if mine == other:
            return list(range(mine))
        # Rows of a pruned router are rows of the parent's, in their order.
        pruned = router is not None and len(router) == mine and router == sorted(set(router))
        return router if pruned else None

    def _check_layer(
        self,
        ours: Side,
        theirs: Side,
        layer: int,
        expected: list[int],
        geometry: Geometry | None,
        router: list[int] | None,
    ) -> Iterator[Finding]:
        merges = self.child.record is not None and rewrites(self.child.record)
        moved: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        parts, silent = ours.parts(layer), set[str]()
        for part in parts:
            ours_EN, theirs_PN = samples(ours, (layer, part)), samples(theirs, (layer, part))
            if ours_EN is None or theirs_PN is None or ours_EN.shape[1] != theirs_PN.shape[1]:
                continue
            index_E, best_E = matches(ours_EN, theirs_PN, expected)
            blank = {e for e, source in enumerate(expected) if not (theirs_PN[source].any() and ours_EN[e].any())}
            silent |= {part} if blank else set()
            for expert, (source, best) in enumerate(zip(index_E, best_E, strict=True)):
                if expert in blank:
                    continue
                if best < RELATED and not merges:
                    yield _unrelated(ours, theirs, layer, part, (expert, expected[expert]), geometry)
                elif best >= RELATED and source != expected[expert]:
                    moved[expert][source].append(part)
        if silent:
            yield self._zeros(layer, silent)
        if not merges:
            yield from _explain_moves(self.child, shown(layer), len(set(parts) - silent), moved, router, expected)
        if not moved:
            yield from self._moved_rows(layer, router, expected)

    def _moved_rows(self, layer: int, router: list[int] | None, expected: Sequence[int]) -> Iterator[Finding]:
        if router is not None and router != list(expected):
            rows = [expert for expert, source in enumerate(router) if source != expected[expert]]
            message = f"the router's rows of experts {rows} were moved, the experts were not"
            yield _error(self.child, "router-rows-moved", message, layer, rows[0])

    def _zeros(self, layer: int, parts: set[str]) -> Finding:
        message = f"zeros say nothing: {', '.join(sorted(parts))} of experts here or in the parent is all zeros"
        return Finding(
            severity="note", code="zeros-say-nothing", message=message, file=str(self.child.path), layer=shown(layer)
        )


def _sizes(side: Side, layer: int) -> dict[str, set[int]]:
    """Part -> how many numbers each expert has of it, whichever way round."""

    def size(unit: Unit) -> int:
        shape = side.checkpoint.tensors[unit.name].shape
        return math.prod(shape if unit.slice is None else shape[1:])

    return {part: {size(unit) for unit in side.units[layer, part].values()} for part in side.parts(layer)}


def _explain_moves(
    child: Checkpoint,
    layer: int,
    parts: int,
    moved: Mapping[int, Mapping[int, list[str]]],
    router: list[int] | None,
    expected: Sequence[int],
) -> Iterator[Finding]:
    lawful = router is not None and all(
        set(sources) == {router[expert]} and len(sources[router[expert]]) == parts for expert, sources in moved.items()
    )
    if moved and lawful and router is not None and {e for e, s in enumerate(router) if expected[e] != s} == set(moved):
        yield Finding(
            severity="note",
            code="permuted",
            message=f"{len(moved)} experts were reordered together with their router rows, which changes nothing",
            file=str(child.path),
            layer=layer,
        )
        return
    for expert, sources in sorted(moved.items()):
        for source, names in sorted(sources.items()):
            if expert in moved.get(source, {}) and source < expert:
                continue
            swapped = expert in moved.get(source, {})
            what = f"experts {expert} and {source} are swapped" if swapped else f"this is the parent's expert {source}"
            message = f"{what} ({', '.join(names)}), and the router does not know"
            yield _error(child, "experts-swapped" if swapped else "expert-replaced", message, layer, expert)


def _unrelated(
    ours: Side, theirs: Side, layer: int, part: str, pair: tuple[int, int], geometry: Geometry | None
) -> Finding:
    """An expert that is none of the parent's as it stands: transposed, halves swapped, or foreign."""
    expert, source = pair
    mine = read_unit(ours.checkpoint, ours.units[layer, part][expert])
    other = read_unit(theirs.checkpoint, theirs.units[layer, part][source])
    assert mine is not None
    assert other is not None

    def related(left: Tensor | None, right: Tensor | None) -> bool:
        same = left is not None and right is not None and left.shape == right.shape
        return same and float(sample(left) @ sample(right)) > RELATED  # type: ignore[arg-type]

    name = ours.units[layer, part][expert].name
    if mine.dim() == 2 and related(mine.T, other):
        return _error(ours.checkpoint, "transposed", f"{name} is the parent's, transposed", layer, expert)
    if part.startswith("gate_up") and related(swap_halves(mine, geometry), other):
        return _error(ours.checkpoint, "gate-up-swapped", f"gate and up halves of {name} are swapped", layer, expert)
    twin = {"gate": "up", "up": "gate"}.get(part)
    counterpart = theirs.units.get((layer, twin), {}).get(source) if twin else None
    if counterpart is not None and related(mine, read_unit(theirs.checkpoint, counterpart)):
        message = f"{name} is the parent's {twin} projection"
        return _error(ours.checkpoint, "gate-up-swapped", message, layer, expert)
    message = f"{name} has nothing in common with the parent's"
    return _error(ours.checkpoint, "unrelated", message, layer, expert)


def _error(child: Checkpoint, code: str, message: str, layer: int, expert: int) -> Finding:
    return Finding(
        severity="error",
        code=code,
        message=message,
        file=str(child.path),
        layer=shown(layer),
        expert=expert,
        hint="take this expert from the parent again, or make the checkpoint again",
    )
