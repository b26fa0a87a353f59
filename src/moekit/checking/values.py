"""Are the numbers sound by themselves: finite, scaled, not dead, not copied?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

from moekit.checking.report import Finding
from moekit.checking.scan import MatrixScan, TensorScan
from moekit.checking.units import Unit, place_of, unit_digests, unit_matrices
from moekit.checkpoint.experts import counts_of
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.safety import TensorInfo


def _place(checkpoint: Checkpoint, info: TensorInfo) -> str:
    return str(checkpoint.path / info.shard)


def check_finite(checkpoint: Checkpoint, scans: Mapping[str, TensorScan]) -> Iterator[Finding]:
    """NaN and infinity, in weights and in the scales of quantized ones."""
    for scan in scans.values():
        for unit, matrix in unit_matrices(scan).items():
            if matrix.finite and not _packed_scale_is_nan(scan, matrix):
                continue
            layer, expert = place_of(checkpoint, unit)
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
    """Scales must be positive: a zero scale silences what it scales. Parameters that are called so may be anything."""
    layout = checkpoint.known_layout
    for scan in scans.values():
        if not scan.info.name.endswith(("_scale", "_scale_inv", "scales")) or scan.info.dtype == "U8":
            continue
        if layout is not None and layout.live_name(scan.info.name) in layout.live:
            continue
        for unit, matrix in unit_matrices(scan).items():
            if matrix.finite and matrix.low <= 0:
                layer, expert = place_of(checkpoint, unit)
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
    counts = counts_of(checkpoint)

    def routes(info: TensorInfo) -> bool:
        """Whether a tensor looks like a router, which is looked at elsewhere."""
        layer, _ = checkpoint.where(info.name)
        return layer is not None and info.shape[0] == counts.get(layer)

    experts: dict[tuple[str, int], dict[int, list[Unit]]] = defaultdict(lambda: defaultdict(list))
    for scan in scans.values():
        for unit, matrix in unit_matrices(scan).items():
            layer = place_of(checkpoint, unit)[0]
            if unit.block and layer is not None and unit.expert is not None:
                silent = matrix.zero and unit.part in {"gate", "up", "gate_up", "down"}
                experts[unit.block, layer][unit.expert] += [unit] if silent else []
            elif matrix.zero and len(scan.info.shape) == 2 and min(scan.info.shape) > 1 and not routes(scan.info):
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


def _all_zero(checkpoint: Checkpoint, info: TensorInfo) -> Finding:
    layer, expert = checkpoint.where(info.name)
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
            layer, expert = place_of(checkpoint, unit)
            if layer is not None and expert is not None:
                layers[unit.block, layer][expert][unit.part] = digest
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
