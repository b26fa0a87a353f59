"""Is this still its parent? Compares every expert with the parent's experts by content, fine-tuned or not.

Each matrix is represented by a sample of its elements; the cosine of two samples is near one for the same matrix, high
for a fine-tuned one, near zero for unrelated ones. Experts that answer best to another expert of the parent were moved;
that is legal if the router's rows moved with them (a placement does so), and a silent error if they did not. A pruned
child is compared with the experts that its record says it kept, or else with those that its router's rows came from.
A matrix of zeros, as right after a residual conversion, says nothing.

Legend: E experts, P parent's experts, N sampled elements, H hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moekit import catalogue
from moekit._progress import Progress, track
from moekit.anatomy.probe import Geometry, MoELayer
from moekit.checking.report import Finding
from moekit.checking.samples import RELATED, Side, matches, router_moves, sample, samples, shown, side_of
from moekit.checking.units import read_unit, swap_halves
from moekit.checkpoint.expected import Layout
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import text_config
from moekit.errors import MoekitError


@dataclass
class ParentCheck:
    """Compares the experts and routers of two checkpoints.

    Attributes:
        child: what is checked.
        parent: what it was made from, or another trusted version of it.
        layout: of the child.
        layers: MoE layers of the child's model.
        compared: decoder layers whose experts were compared.
        apart: whether there are layers that could not be compared.
    """

    child: Checkpoint
    parent: Checkpoint
    layout: Layout | None
    layers: list[MoELayer]
    compared: list[int] = field(default_factory=list)
    apart: bool = False

    def findings(self, progress: Progress | None = None) -> Iterator[Finding]:
        """Everything that is not the parent's; told layer by layer."""
        ours, theirs = side_of(self.child), side_of(self.parent)
        both = sorted(n for n in ours.layers & theirs.layers if ours.parts(n) == theirs.parts(n))
        kinds = {text_config(side.config).get("model_type") for side in (self.child, self.parent)}
        if not both or (len(kinds) > 1 and ours.units.keys() != theirs.units.keys()):
            yield self._note(f"{self.parent.path} keeps its experts in other layers or another layout: not compared")
            return
        for layer in sorted(ours.layers - set(both)):
            yield self._note("the parent's experts of this layer lie in another layout, or are none", shown(layer))
        geometries = {layer.index: layer.geometry for layer in self.layers}
        routers = router_moves(self.child, self.parent, self.layout, self.layers)
        kept = self._recorded()
        for layer in track(both, "comparing with the parent", progress):
            sizes = [{len(side.units[layer, part]) for part in side.parts(layer)} for side in (ours, theirs)]
            expected = self._expected(layer, sizes, routers.get(layer), kept)
            if expected is None:
                yield self._note("the parent has another number of experts here: not compared", shown(layer))
                continue
            self.compared.append(layer)
            yield from self._check_layer(ours, theirs, layer, expected, geometries.get(layer), routers.get(layer))

    def _note(self, message: str, layer: int | None = None) -> Finding:
        self.apart = True
        return Finding(severity="note", code="not-comparable", message=message, file=str(self.child.path), layer=layer)

    def _recorded(self) -> Mapping[str, Sequence[int]]:
        """Which of the parent's experts the record says were kept; nothing where it speaks of another parent."""
        record = self.child.record
        if record is None or record.parent_fingerprint != self.parent.fingerprint:
            return {}
        kept = record.scores.get("kept")
        return kept if isinstance(kept, Mapping) else {}

    def _expected(
        self, layer: int, sizes: list[set[int]], router: list[int] | None, kept: Mapping[str, Sequence[int]]
    ) -> list[int] | None:
        """For each expert the parent's that it should be; None where nobody knows."""
        if any(len(counts) > 1 for counts in sizes):
            return None
        mine, other = sizes[0].pop(), sizes[1].pop()
        recorded = list(kept.get(str(layer)) or ())
        if len(recorded) == mine and all(isinstance(e, int) and 0 <= e < other for e in recorded):
            return recorded
        if mine == other:
            return list(range(mine))
        # Rows of a pruned router are rows of the parent's, in their order.
        pruned = router is not None and len(router) == mine and router == sorted(set(router))
        return router if pruned else None

    def _merges(self) -> bool:
        """Whether the record says that a method has rewritten the experts that stayed."""
        record = self.child.record
        name = record.config.get("method") if record is not None else None
        if record is None or not isinstance(name, str) or "kept" not in record.scores:
            return False
        try:
            return bool(getattr(catalogue.get("prune", name).cls, "rewrites", False))
        except MoekitError:
            return True  # a method of another package

    def _check_layer(
        self,
        ours: Side,
        theirs: Side,
        layer: int,
        expected: list[int],
        geometry: Geometry | None,
        router: list[int] | None,
    ) -> Iterator[Finding]:
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
                if best < RELATED and not self._merges():
                    yield _unrelated(ours, theirs, layer, part, (expert, expected[expert]), geometry)
                elif best >= RELATED and source != expected[expert]:
                    moved[expert][source].append(part)
        if silent:
            yield self._zeros(layer, silent)
        if not self._merges():
            yield from _explain_moves(self.child, shown(layer), len(set(parts) - silent), moved, router, expected)
        if router is not None and not moved and router != expected:
            rows = [expert for expert, source in enumerate(router) if source != expected[expert]]
            message = f"the router's rows of experts {rows} were moved, the experts were not"
            yield _error(self.child, "router-rows-moved", message, layer, rows[0])

    def _zeros(self, layer: int, parts: set[str]) -> Finding:
        message = f"zeros say nothing: {', '.join(sorted(parts))} of experts here or in the parent is all zeros"
        return Finding(
            severity="note", code="zeros-say-nothing", message=message, file=str(self.child.path), layer=shown(layer)
        )


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
