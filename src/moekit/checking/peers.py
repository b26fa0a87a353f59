"""Do experts look like their peers? What statistics can suspect without a record or a parent.

In a trained model gate and up differ in size, and both write large numbers into certain hidden dimensions: the same
ones for all experts of a layer, and much the same for neighbouring layers. On SmolLM2's feed-forward networks, split
into 32 experts a layer, neighbouring layers correlate by 0.6 to 0.95 (but for both ends), and each of 960 experts'
gate looks more like its peers' gates than like their ups. An expert that breaks such a pattern is suspected, which is
a warning; in a random model there are no patterns, and nothing is said.

Legend: N peers, L layers, H hidden.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moekit.checking.report import Finding
from moekit.checking.scan import TensorScan
from moekit.checking.units import place_of, unit_matrices
from moekit.checkpoint.folder import Checkpoint

# Peers must agree this well (median correlation) before one that does not is suspected.
_PEERS_AGREE, _STRANGER = 0.6, 0.2
# By how much gates must look more like gates than like ups (median), before one where it is the other way round is.
_TELLING = 0.15
_MIN_PEERS = 4
_HINT = "compare with the parent: moekit check --parent"


@dataclass
class _Layer:
    """One layer's experts: norms along the hidden axis and sizes, by part and expert."""

    profiles: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    sizes: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))


def _collect(checkpoint: Checkpoint, scans: Mapping[str, TensorScan], gate_first: bool) -> dict[int, _Layer]:
    """Profiles and sizes of all expert matrices; fused ones by their halves where gate comes first."""
    layers: dict[int, _Layer] = defaultdict(_Layer)
    for scan in scans.values():
        for unit, matrix in unit_matrices(scan).items():
            number = place_of(checkpoint, unit)[0]
            if number is None or unit.expert is None or not matrix.finite or matrix.zero:
                continue
            layer = layers[number]
            if unit.part != "gate_up":
                layer.sizes[unit.part][unit.expert] = matrix.rms
                if matrix.profile_H is not None:
                    layer.profiles[unit.part][unit.expert] = matrix.profile_H
                continue
            for part, rms in zip(("gate", "up"), (matrix.halves or ()) if gate_first else (), strict=False):
                layer.sizes[part][unit.expert] = rms
            for part, half_H in zip(("gate", "up"), (matrix.half_profiles or ()) if gate_first else (), strict=False):
                layer.profiles[part][unit.expert] = half_H
    return dict(sorted(layers.items()))


def check_peers(checkpoint: Checkpoint, scans: Mapping[str, TensorScan], gate_first: bool) -> Iterator[Finding]:
    """Suspect experts and layers whose gate and up look swapped, or that look like no peer at all.

    Args:
        checkpoint: for messages.
        scans: of all tensors.
        gate_first: whether fused matrices hold all gate rows before all up rows.
    """
    layers = _collect(checkpoint, scans, gate_first)
    swapped = {*_swapped_by_size(layers), *_swapped_by_profile(layers)}
    whole = {layer for layer, expert in swapped if expert is None}
    for layer, expert in sorted(swapped, key=lambda place: (place[0], -1 if place[1] is None else place[1])):
        if expert is None or layer not in whole:
            who = "this expert" if expert is not None else "all experts of this layer"
            message = f"gate and up of {who} look like those of their peers the other way round: they may be swapped"
            yield _suspect(checkpoint, "gate-up-suspect", message, layer, expert)
    for layer, expert, part in _strangers_everywhere(layers):
        if (layer, expert) not in swapped and not (layer in whole and part in {"gate", "up"}):
            who = "this expert" if expert is not None else "this layer"
            message = f"the {part} projection of {who} favours other hidden dimensions than its peers: transposed, or "
            yield _suspect(checkpoint, "stranger", f"{message}of another model", layer, expert)


def _suspect(checkpoint: Checkpoint, code: str, message: str, layer: int, expert: int | None) -> Finding:
    return Finding(
        severity="warning",
        code=code,
        message=message,
        file=str(checkpoint.path),
        layer=layer,
        expert=expert,
        hint=_HINT,
    )


def _swapped_by_size(layers: Mapping[int, _Layer]) -> Iterator[tuple[int, int | None]]:
    """Experts, and whole layers, whose ratio of gate's size to up's is the inverse of their peers'."""
    ratios = {
        layer: {
            e: math.log(rms / data.sizes["up"][e]) for e, rms in data.sizes["gate"].items() if e in data.sizes["up"]
        }
        for layer, data in layers.items()
    }
    everywhere = [ratio for by_expert in ratios.values() for ratio in by_expert.values()]
    for layer, by_expert in ratios.items():
        peers = list(by_expert.values())
        odd = [expert for expert, ratio in by_expert.items() if _mirrored(ratio, peers)]
        yield from ((layer, expert) for expert in odd)
        few = len(peers) * 4 <= len(everywhere)
        if peers and not odd and few and _mirrored(statistics.median(peers), everywhere):
            yield layer, None


def _mirrored(value: float, peers: list[float]) -> bool:
    """Whether a value lies where the mirror image of its peers lies, far from the peers themselves."""
    if len(peers) < _MIN_PEERS:
        return False
    middle = statistics.median(peers)
    spread = 1.4826 * statistics.median(abs(peer - middle) for peer in peers) + 1e-3
    return abs(middle) > 6 * spread and abs(value + middle) < 4 * spread and abs(value - middle) > 8 * spread


def _others(rows_NH: Tensor) -> Tensor:
    """For each row the mean of all other rows: a row compared with a mean it is part of would resemble itself."""
    return (rows_NH.sum(dim=0) - rows_NH) / max(rows_NH.shape[0] - 1, 1)


def _correlate(left_NH: Tensor, right_NH: Tensor) -> Tensor:
    """Pearson's correlation row by row: [N]."""
    left_NH, right_NH = (rows - rows.mean(dim=1, keepdim=True) for rows in (left_NH, right_NH))
    return torch.nn.functional.cosine_similarity(left_NH, right_NH, dim=1).nan_to_num()


def _advantage(gates_NH: Tensor, ups_NH: Tensor, gate_NH: Tensor, up_NH: Tensor) -> Tensor:
    """How much more gates look like reference gates, and ups like reference ups, than the other way round: [N]."""
    straight = _correlate(gates_NH, gate_NH) + _correlate(ups_NH, up_NH)
    return straight - _correlate(gates_NH, up_NH) - _correlate(ups_NH, gate_NH)


def _telling(advantage_N: Tensor, index: int, hidden: int) -> bool:
    """Whether one advantage is as negative as the others are positive, well above the chance of `hidden` samples."""
    others_N = torch.cat([advantage_N[:index], advantage_N[index + 1 :]])
    middle = float(others_N.median())
    clear = middle > max(_TELLING, 4 / math.sqrt(hidden)) and float((others_N > 0).float().mean()) > 0.9
    return clear and float(advantage_N[index]) < -0.4 * middle


def _swapped_by_profile(layers: Mapping[int, _Layer]) -> Iterator[tuple[int, int | None]]:
    """Experts whose gate looks like its peers' ups and the other way round; layers likewise, against neighbours."""
    means: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, data in layers.items():
        gates, ups = data.profiles.get("gate", {}), data.profiles.get("up", {})
        experts = sorted(gates.keys() & ups.keys())
        if len(experts) < _MIN_PEERS:
            continue
        gates_NH, ups_NH = torch.stack([gates[e] for e in experts]), torch.stack([ups[e] for e in experts])
        means[layer] = gates_NH.mean(dim=0), ups_NH.mean(dim=0)
        advantage_N = _advantage(gates_NH, ups_NH, _others(gates_NH), _others(ups_NH))
        hidden = gates_NH.shape[1]
        yield from ((layer, expert) for index, expert in enumerate(experts) if _telling(advantage_N, index, hidden))
    order = list(means)
    if len(order) < _MIN_PEERS + 2:
        return
    advantage_L = torch.stack([_neighbour_advantage(means, order, index) for index in range(1, len(order) - 1)])
    hidden = means[order[0]][0].shape[0]
    for index in range(len(advantage_L)):
        # The neighbours of a swapped layer see it on one side: they say nothing.
        keep = [other for other in range(len(advantage_L)) if abs(other - index) != 1]
        if len(keep) >= _MIN_PEERS - 1 and _telling(advantage_L[keep], keep.index(index), hidden):
            yield order[index + 1], None


def _neighbour_advantage(means: Mapping[int, tuple[Tensor, Tensor]], order: list[int], index: int) -> Tensor:
    gate_1H, up_1H = (mean[None] for mean in means[order[index]])
    sides = [means[order[index - 1]], means[order[index + 1]]]
    return torch.stack([_advantage(gate_1H, up_1H, gate[None], up[None])[0] for gate, up in sides]).mean()


def _strangers_everywhere(layers: Mapping[int, _Layer]) -> Iterator[tuple[int, int | None, str]]:
    """Experts unlike their layer, and layers unlike their neighbours: (layer, expert, part)."""
    means: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for layer, data in layers.items():
        for part, by_expert in data.profiles.items():
            rows_NH = torch.stack(list(by_expert.values()))
            means[part][layer] = rows_NH.mean(dim=0)
            for index in _strangers(rows_NH):
                yield layer, list(by_expert)[index], part
    for part, by_layer in means.items():
        order = sorted(by_layer)
        for index in _strange_layers(torch.stack([by_layer[layer] for layer in order])):
            yield order[index], None, part


def _strangers(rows_NH: Tensor) -> list[int]:
    """Rows that do not correlate with the mean of the others, where most do."""
    if rows_NH.shape[0] < _MIN_PEERS:
        return []
    correlation_N = _correlate(rows_NH, _others(rows_NH))
    if float(correlation_N.median()) < _PEERS_AGREE:
        return []
    return [index for index, value in enumerate(correlation_N.tolist()) if value < _STRANGER]


def _strange_layers(means_LH: Tensor) -> list[int]:
    """Layers unlike both neighbours, which are alike across the gap; first and last layers always differ."""
    count = means_LH.shape[0]
    if count < _MIN_PEERS:
        return []
    correlation_LL = torch.corrcoef(means_LH).nan_to_num()
    next_L = correlation_LL.diagonal(1).tolist()
    strange = []
    for index in range(1, count - 1):
        elsewhere = [*next_L[: index - 1], *next_L[index + 1 :], float(correlation_LL[index - 1, index + 1])]
        odd = max(next_L[index - 1], next_L[index]) < _STRANGER
        if odd and statistics.median(elsewhere) > _PEERS_AGREE and elsewhere[-1] > _PEERS_AGREE:
            strange.append(index)
    return strange
