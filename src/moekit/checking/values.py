"""Are the numbers sound: finite, not dead, and like those of their peers?

What needs no record. Statistics can only suspect, so what they find is a warning; what is wrong by itself is an error.

Legend: H hidden.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moekit.checking.report import Finding
from moekit.checking.scan import MatrixScan, TensorScan
from moekit.checking.units import Unit, unit_digests, unit_matrices
from moekit.checkpoint.experts import expert_counts
from moekit.checkpoint.folder import Checkpoint, where
from moekit.checkpoint.safety import TensorInfo

# Peers must agree this well (median correlation) before one that does not is suspected.
_PEERS_AGREE, _STRANGER = 0.6, 0.2
_MIN_PEERS = 4


def _place(checkpoint: Checkpoint, info: TensorInfo) -> str:
    return str(checkpoint.path / info.shard)


def check_finite(checkpoint: Checkpoint, scans: Mapping[str, TensorScan]) -> Iterator[Finding]:
    """NaN and infinity, in weights and in the scales of quantized ones."""
    for scan in scans.values():
        for unit, matrix in unit_matrices(scan).items():
            if matrix.finite and not _packed_scale_is_nan(scan, matrix):
                continue
            layer, expert = (unit.layer, unit.expert) if unit.block else where(unit.name)
            what = "the scale" if "scale" in unit.name else "the tensor"
            nan = math.isnan(matrix.low) or math.isnan(matrix.high) or matrix.finite
            yield Finding(
                severity="error",
                code="non-finite",
                message=f"{what} {unit.name} holds {'NaN' if nan else 'infinity'}",
                file=_place(checkpoint, scan.info),
                layer=layer,
                expert=expert,
                hint="an expert that saw no token in calibration, or a broken write: make it again",
            )


def _packed_scale_is_nan(scan: TensorScan, matrix: MatrixScan) -> bool:
    """Scales of four-bit blocks are powers of two in a byte, where 255 stands for NaN."""
    return scan.info.dtype == "U8" and scan.info.name.endswith("_scales") and matrix.high == 255


def check_scales(checkpoint: Checkpoint, scans: Mapping[str, TensorScan]) -> Iterator[Finding]:
    """Scales must be positive: a zero scale silences what it scales."""
    for scan in scans.values():
        if not scan.info.name.endswith(("_scale", "_scale_inv", "scales")) or scan.info.dtype == "U8":
            continue
        for unit, matrix in unit_matrices(scan).items():
            if matrix.finite and matrix.low <= 0:
                layer, expert = (unit.layer, unit.expert) if unit.block else where(unit.name)
                yield Finding(
                    severity="error",
                    code="bad-scale",
                    message=f"the scale {unit.name} holds {'zero' if matrix.low == 0 else 'negative values'}",
                    file=_place(checkpoint, scan.info),
                    layer=layer,
                    expert=expert,
                    hint="quantize this expert again, from its weights alone if it saw no token",
                )


def check_dead(checkpoint: Checkpoint, scans: Mapping[str, TensorScan]) -> Iterator[Finding]:
    """Experts that can only answer zero, and other matrices that are all zero."""
    counts = expert_counts(checkpoint.tensors)
    experts: dict[tuple[str, int], dict[int, list[Unit]]] = defaultdict(lambda: defaultdict(list))
    for scan in scans.values():
        for unit, matrix in unit_matrices(scan).items():
            if unit.block and unit.layer is not None and unit.expert is not None:
                silent = matrix.zero and unit.part in {"gate", "up", "gate_up", "down"}
                experts[unit.block, unit.layer][unit.expert] += [unit] if silent else []
            elif matrix.zero and len(scan.info.shape) == 2 and min(scan.info.shape) > 1 and not _routes(scan, counts):
                yield _all_zero(checkpoint, scan.info)
    for (block, layer), found in experts.items():
        dead = sorted(expert for expert, silent in found.items() if silent)
        if dead and len(dead) == len(found):
            yield Finding(
                severity="warning",
                code="silent-layer",
                message="all routed experts of this layer answer zero, as right after a conversion",
                file=str(checkpoint.path),
                layer=layer,
                hint=f"train it; {block} adds nothing yet",
            )
            continue
        for expert in dead:
            parts = ", ".join(sorted(unit.part for unit in found[expert]))
            yield Finding(
                severity="error",
                code="dead-expert",
                message=f"this expert can only answer zero: its {parts} projection is all zeros",
                file=_place(checkpoint, checkpoint.tensors[found[expert][0].name]),
                layer=layer,
                expert=expert,
                hint="a converter or merge lost it: take it from the parent again, or prune it properly",
            )


def _routes(scan: TensorScan, counts: Mapping[int, int]) -> bool:
    """Whether a tensor looks like a router, which is looked at elsewhere."""
    layer, _ = where(scan.info.name)
    return layer is not None and scan.info.shape[0] == counts.get(layer)


def _all_zero(checkpoint: Checkpoint, info: TensorInfo) -> Finding:
    layer, expert = where(info.name)
    return Finding(
        severity="warning",
        code="all-zero",
        message=f"{info.name} is all zeros",
        file=_place(checkpoint, info),
        layer=layer,
        expert=expert,
    )


def check_copies(checkpoint: Checkpoint, scans: Mapping[str, TensorScan]) -> Iterator[Finding]:
    """Experts of one layer that are byte for byte the same: one was lost and another took its place, or a merge."""
    layers: dict[tuple[str, int], dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for scan in scans.values():
        for unit, digest in unit_digests(scan).items():
            if unit.layer is not None and unit.expert is not None:
                layers[unit.block, unit.layer][unit.expert][unit.part] = digest
    for (_, layer), experts in layers.items():
        same: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
        for expert, parts in experts.items():
            same[tuple(sorted(parts.items()))].append(expert)
        for copies in same.values():
            if len(copies) > 1:
                every = len(copies) == len(experts)
                yield Finding(
                    severity="note" if every else "warning",
                    code="equal-experts",
                    message=f"{'all experts' if every else f'experts {sorted(copies)}'} of this layer are the same",
                    file=str(checkpoint.path),
                    layer=layer,
                    expert=None if every else min(copies),
                    hint=None if every else "one may have been lost in a conversion and another written in its place",
                )


def check_gate_up(checkpoint: Checkpoint, scans: Mapping[str, TensorScan], fused_halves: bool) -> Iterator[Finding]:
    """Experts whose gate and up sizes are the other way round than those of all peers.

    Args:
        checkpoint: for messages.
        scans: of all tensors.
        fused_halves: whether fused matrices hold gate first and up second.
    """
    ratios: dict[int, dict[int, float]] = defaultdict(dict)
    sizes: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    for scan in scans.values():
        for unit, matrix in unit_matrices(scan).items():
            if unit.layer is None or unit.expert is None:
                continue
            if unit.part in {"gate", "up"}:
                sizes[unit.layer, unit.expert][unit.part] = matrix.rms
            elif unit.part == "gate_up" and fused_halves and matrix.halves:
                sizes[unit.layer, unit.expert] = dict(zip(("gate", "up"), matrix.halves, strict=True))
    for (layer, expert), both in sizes.items():
        if min(both.get("gate", 0.0), both.get("up", 0.0)) > 0 and all(map(math.isfinite, both.values())):
            ratios[layer][expert] = math.log(both["gate"] / both["up"])
    everywhere = [ratio for layer in ratios.values() for ratio in layer.values()]
    for layer, by_expert in ratios.items():
        peers = list(by_expert.values())
        odd = [expert for expert in by_expert if _mirrored(by_expert[expert], peers)]
        if not odd and _mirrored(statistics.median(peers), everywhere) and len(peers) * 4 <= len(everywhere):
            yield _suspect_gate_up(checkpoint, layer, None)
        for expert in odd:
            yield _suspect_gate_up(checkpoint, layer, expert)


def _mirrored(value: float, peers: list[float]) -> bool:
    """Whether a value lies where the mirror image of its peers lies, far from the peers themselves."""
    if len(peers) < _MIN_PEERS:
        return False
    middle = statistics.median(peers)
    spread = 1.4826 * statistics.median(abs(peer - middle) for peer in peers) + 1e-3
    return abs(middle) > 6 * spread and abs(value + middle) < 4 * spread and abs(value - middle) > 8 * spread


def _suspect_gate_up(checkpoint: Checkpoint, layer: int, expert: int | None) -> Finding:
    who = "this expert" if expert is not None else "all experts of this layer"
    return Finding(
        severity="warning",
        code="gate-up-suspect",
        message=f"gate and up of {who} have the sizes the other way round than their peers: they may be swapped",
        file=str(checkpoint.path),
        layer=layer,
        expert=expert,
        hint="compare with the parent: moekit check --parent",
    )


def check_profiles(checkpoint: Checkpoint, scans: Mapping[str, TensorScan]) -> Iterator[Finding]:
    """Experts whose norms along the hidden axis look like no peer's: transposed, or of another model.

    In a trained model the large and small hidden dimensions are the same for all experts of a layer, and much the same
    for neighbouring layers (correlation 0.7 to 0.95 on SmolLM2, except at both ends); in a random one nothing agrees,
    and nothing is said.
    """
    profiles: dict[tuple[int, str], dict[int, Tensor]] = defaultdict(dict)
    for scan in scans.values():
        for unit, matrix in unit_matrices(scan).items():
            if unit.layer is not None and unit.expert is not None and matrix.profile_H is not None and matrix.finite:
                profiles[unit.layer, unit.part][unit.expert] = matrix.profile_H
    means: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (layer, part), by_expert in profiles.items():
        stack_EH = torch.stack(list(by_expert.values()))
        means[part][layer] = stack_EH.mean(dim=0)
        for index in _strangers(stack_EH):
            yield _stranger(checkpoint, layer, list(by_expert)[index], f"the {part} projection of this expert")
    for part, by_layer in means.items():
        layers = sorted(by_layer)
        for index in _strange_layers(torch.stack([by_layer[layer] for layer in layers])):
            yield _stranger(checkpoint, layers[index], None, f"the {part} projections of this layer")


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


def _strangers(profiles_NH: Tensor) -> list[int]:
    """Rows that do not correlate with the median of the others, where those correlate among each other."""
    count = profiles_NH.shape[0]
    if count < _MIN_PEERS:
        return []
    middle_H = profiles_NH.median(dim=0).values
    correlations = torch.corrcoef(torch.cat([middle_H[None], profiles_NH]))[0, 1:].nan_to_num()
    if float(correlations.median()) < _PEERS_AGREE:
        return []
    return [index for index in range(count) if float(correlations[index]) < _STRANGER]


def _stranger(checkpoint: Checkpoint, layer: int, expert: int | None, who: str) -> Finding:
    return Finding(
        severity="warning",
        code="stranger",
        message=f"{who} favours other hidden dimensions than its peers: transposed, or of another model",
        file=str(checkpoint.path),
        layer=layer,
        expert=expert,
        hint="compare with the parent: moekit check --parent",
    )
