"""Is this still its parent? Compares every expert with the parent's experts by content, fine-tuned or not.

Each matrix is represented by a sample of its elements; the cosine of two samples is near one for the same matrix, high
for a fine-tuned one, near zero for unrelated ones. Experts that answer best to another expert of the parent were moved;
that is legal if the router's rows moved with them (a placement does so), and a silent error if they did not.

Legend: E experts, P parent's experts, N sampled elements, H hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit._progress import Progress, track
from moekit.anatomy.probe import Geometry, MoELayer
from moekit.checking.report import Finding
from moekit.checking.units import Unit, read_unit, swap_halves, units_of
from moekit.checkpoint.expected import Layout, disk_names
from moekit.checkpoint.folder import Checkpoint

_SAMPLES = 4096
# Cosines below this are unrelated; a better match elsewhere must win by the margin.
_RELATED, _MARGIN = 0.25, 0.15


@dataclass(frozen=True)
class _Side:
    """One checkpoint seen expert by expert: (layer, part) -> expert -> unit."""

    checkpoint: Checkpoint
    units: Mapping[tuple[int, str], Mapping[int, Unit]]


def _side(checkpoint: Checkpoint) -> _Side:
    units: dict[tuple[int, str], dict[int, Unit]] = defaultdict(dict)
    for info in checkpoint.tensors.values():
        for unit in units_of(info):
            if unit.layer is not None and unit.expert is not None and "." not in unit.part:
                units[unit.layer, unit.part][unit.expert] = unit
    return _Side(checkpoint, units)


def _sample(matrix: Tensor) -> Tensor:
    flat = matrix.reshape(-1)
    if flat.numel() > _SAMPLES:
        flat = flat[torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()]
    return torch.nn.functional.normalize(flat.float(), dim=0)


def _samples(side: _Side, key: tuple[int, str]) -> Tensor | None:
    rows = []
    for expert in sorted(side.units[key]):
        matrix = read_unit(side.checkpoint, side.units[key][expert])
        if matrix is None:
            return None
        rows.append(_sample(matrix))
    return torch.stack(rows) if rows else None


def check_parent(
    child: Checkpoint,
    parent: Checkpoint,
    layout: Layout | None,
    layers: list[MoELayer],
    progress: Progress | None = None,
) -> Iterator[Finding]:
    """Compare the experts and routers of two checkpoints with the same geometry.

    Args:
        child: what is checked.
        parent: what it was made from, or another trusted version of it.
        layout: of the child.
        layers: MoE layers of the child's model.
        progress: told layer by layer.
    """
    ours, theirs = _side(child), _side(parent)
    if ours.units.keys() != theirs.units.keys() or not ours.units:
        yield _note(child, f"{parent.path} keeps its experts in other layers or another layout: not compared")
        return
    geometries = {layer.index: layer.geometry for layer in layers}
    routers = _router_moves(child, parent, layout, layers)
    for layer in track(sorted({layer for layer, _ in ours.units}), "comparing with the parent", progress):
        parts = sorted(part for other, part in ours.units if other == layer)
        counts = {len(side.units[layer, part]) for side in (ours, theirs) for part in parts}
        if len(counts) > 1:
            yield _note(child, "the parent has another number of experts here: not compared", layer)
            continue
        yield from _check_layer(ours, theirs, layer, parts, geometries.get(layer), routers.get(layer))


def _note(child: Checkpoint, message: str, layer: int | None = None) -> Finding:
    return Finding(severity="note", code="not-comparable", message=message, file=str(child.path), layer=layer)


def _matches(ours_EN: Tensor, theirs_PN: Tensor) -> tuple[list[int], list[float], list[float]]:
    """For each expert: the parent's expert it is, its cosine with that one, and with the one of its own index."""
    cosine_EP = ours_EN @ theirs_PN.T
    own_E = cosine_EP.diagonal()
    best_E, index_E = cosine_EP.max(dim=1)
    stays_E = best_E - own_E < _MARGIN
    index_E = torch.where(stays_E, torch.arange(len(own_E)), index_E)
    return index_E.tolist(), best_E.tolist(), own_E.tolist()


def _check_layer(
    ours: _Side, theirs: _Side, layer: int, parts: list[str], geometry: Geometry | None, router: list[int] | None
) -> Iterator[Finding]:
    moved: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for part in parts:
        ours_EN, theirs_PN = _samples(ours, (layer, part)), _samples(theirs, (layer, part))
        if ours_EN is None or theirs_PN is None or ours_EN.shape != theirs_PN.shape:
            continue
        index_E, best_E, _ = _matches(ours_EN, theirs_PN)
        for expert, (source, best) in enumerate(zip(index_E, best_E, strict=True)):
            if best < _RELATED:
                yield _unrelated(ours, theirs, layer, part, expert, geometry)
            elif source != expert:
                moved[expert][source].append(part)
    yield from _explain_moves(ours.checkpoint, layer, len(parts), moved, router)
    if router is not None and not moved and router != sorted(router):
        rows = [expert for expert, source in enumerate(router) if expert != source]
        message = f"the router's rows of experts {rows} were moved, the experts were not"
        yield _error(ours.checkpoint, "router-rows-moved", message, layer, rows[0])


def _explain_moves(
    child: Checkpoint, layer: int, parts: int, moved: Mapping[int, Mapping[int, list[str]]], router: list[int] | None
) -> Iterator[Finding]:
    lawful = router is not None and all(
        set(sources) == {router[expert]} and len(sources[router[expert]]) == parts for expert, sources in moved.items()
    )
    if moved and lawful and router is not None and {e for e, s in enumerate(router) if e != s} == set(moved):
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


def _unrelated(ours: _Side, theirs: _Side, layer: int, part: str, expert: int, geometry: Geometry | None) -> Finding:
    """An expert that is none of the parent's as it stands: transposed, halves swapped, or foreign."""
    mine = read_unit(ours.checkpoint, ours.units[layer, part][expert])
    other = read_unit(theirs.checkpoint, theirs.units[layer, part][expert])
    assert mine is not None
    assert other is not None

    def related(left: Tensor | None, right: Tensor | None) -> bool:
        same = left is not None and right is not None and left.shape == right.shape
        return same and float(_sample(left) @ _sample(right)) > _RELATED  # type: ignore[arg-type]

    name = ours.units[layer, part][expert].name
    if mine.dim() == 2 and related(mine.T, other):
        return _error(ours.checkpoint, "transposed", f"{name} is the parent's, transposed", layer, expert)
    if part.startswith("gate_up") and related(swap_halves(mine, geometry), other):
        return _error(ours.checkpoint, "gate-up-swapped", f"gate and up halves of {name} are swapped", layer, expert)
    twin = {"gate": "up", "up": "gate"}.get(part)
    counterpart = theirs.units.get((layer, twin), {}).get(expert) if twin else None
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
        layer=layer,
        expert=expert,
        hint="take this expert from the parent again, or make the checkpoint again",
    )


def _router_moves(
    child: Checkpoint, parent: Checkpoint, layout: Layout | None, layers: list[MoELayer]
) -> dict[int, list[int]]:
    """Layer -> for each router row the parent's row it is; layers whose routers cannot be compared are left out."""
    if layout is None:
        return {}
    ours, theirs = disk_names(child.tensors, layout), disk_names(parent.tensors, layout)
    moves: dict[int, list[int]] = {}
    for layer in layers:
        shape = (layer.geometry.experts, layer.geometry.hidden)
        for live, name in ours.items():
            if live.startswith(f"{layer.router_name}.") and child.tensors[name].shape == shape and live in theirs:
                mine, other = child.read(name).float(), parent.read(theirs[live]).float()
                if mine.shape != other.shape:
                    continue
                normal = torch.nn.functional.normalize
                index_E, best_E, _ = _matches(normal(mine, dim=1), normal(other, dim=1))
                if min(best_E) >= _RELATED:
                    moves[layer.index] = index_E
    return moves
