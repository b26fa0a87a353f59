"""One pass over all bytes of a checkpoint: digests, extremes and profiles of every matrix, in bounded memory.

Every later check works on what this pass leaves behind, so that a checkpoint is read once, at the speed of the disk.

Legend: E experts, I expert width, H hidden.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit._progress import Progress
from moekit.anatomy.layout import parse_expert_tensor
from moekit.checkpoint.digest import read_range, slice_offsets
from moekit.checkpoint.safety import TensorInfo

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NARROW = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu})
_CHUNK = 32 << 20
# Matrices up to this size are looked at whole, so that their halves and profile can be told.
_WHOLE = 256 << 20
# Rows (or columns) that a profile is taken from.
_PROFILE_LINES = 64
# Runs of neighbouring elements that a root mean square is taken from.
_RUN, _RUNS = 1024, 64


@dataclass(frozen=True)
class MatrixScan:
    """Figures of one matrix (one expert's slice of a stacked tensor, or a whole tensor).

    Attributes:
        low: smallest element, NaN if any is NaN.
        high: largest element, NaN if any is NaN.
        rms: root mean square, of a sample where there are many elements.
        halves: rms of the first and second half of the elements; gate and up, where they are concatenated.
        profile_H: norms along the hidden axis, from evenly spaced lines; None where there is no single hidden axis.
        half_profiles: the same of the first and second half of the rows, where rows are not the hidden axis.
    """

    low: float
    high: float
    rms: float
    halves: tuple[float, float] | None = None
    profile_H: Tensor | None = None
    half_profiles: tuple[Tensor, Tensor] | None = None

    @property
    def finite(self) -> bool:
        """No NaN, no infinity."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def zero(self) -> bool:
        """Every element is zero."""
        return self.low == self.high == 0.0


@dataclass(frozen=True)
class TensorScan:
    """What one pass over a tensor leaves behind.

    Attributes:
        info: from the header.
        sha256: of its bytes.
        slices: SHA-256 of each expert's slice, for tensors that stack experts.
        matrices: figures of each slice, or of the whole tensor; empty for dtypes without figures.
    """

    info: TensorInfo
    sha256: str
    slices: tuple[str, ...] = ()
    matrices: tuple[MatrixScan, ...] = ()


def as_tensor(data: Bytes, dtype: str) -> Tensor | None:
    """Elements of a byte array, flat, without a copy; None for dtypes that torch does not hold."""
    if dtype not in TORCH_DTYPES or not data.size:
        return None
    flat: Tensor = torch.from_numpy(data).view(TORCH_DTYPES[dtype])
    return flat


def _wide(flat: Tensor) -> Tensor:
    return flat.float() if flat.dtype in _NARROW or not flat.is_floating_point() else flat


def _extremes(flat: Tensor) -> tuple[float, float]:
    """Smallest and largest element; NaN if any is NaN."""
    low, high = torch.aminmax(_wide(flat))
    return float(low), float(high)


def _rms(flat: Tensor) -> float:
    """Root mean square of evenly spaced runs of elements; of all of them where there are few."""
    runs = flat.numel() // _RUN
    if runs > _RUNS:
        flat = flat[: runs * _RUN].view(runs, _RUN)[:: runs // _RUNS].reshape(-1)
    wide = _wide(flat).double()
    return math.sqrt(float(wide @ wide) / max(wide.numel(), 1))


def _profile(flat: Tensor, shape: tuple[int, ...], hidden: int) -> Tensor | None:
    if len(shape) != 2 or shape.count(hidden) != 1 or not flat.is_floating_point():
        return None
    matrix = flat.view(shape)
    axis = 1 - shape.index(hidden)  # the axis that is summed over
    step = max(shape[axis] // _PROFILE_LINES, 1)
    lines = matrix[::step] if axis == 0 else matrix[:, ::step]
    norms: Tensor = torch.linalg.vector_norm(lines.float(), dim=axis)
    return norms


def _half_profiles(flat: Tensor, shape: tuple[int, ...], hidden: int) -> tuple[Tensor, Tensor] | None:
    if len(shape) != 2 or shape[0] % 2 or shape[0] == hidden:
        return None
    half = (shape[0] // 2, shape[1])
    first, second = (_profile(part, half, hidden) for part in flat.chunk(2))
    return (first, second) if first is not None and second is not None else None


def _scan_whole(data: Bytes, dtype: str, shape: tuple[int, ...], hidden: int | None) -> MatrixScan | None:
    flat = as_tensor(data, dtype)
    if flat is None:
        return None
    low, high = _extremes(flat)
    half = flat.numel() // 2
    return MatrixScan(
        low,
        high,
        _rms(flat),
        (_rms(flat[:half]), _rms(flat[half : 2 * half])) if hidden else None,
        _profile(flat, shape, hidden) if hidden else None,
        _half_profiles(flat, shape, hidden) if hidden else None,
    )


def _scan_chunks(path: Path, info: TensorInfo) -> TensorScan:
    digest = hashlib.sha256()
    low, high, squares = math.inf, -math.inf, []
    for start in range(*info.offsets, _CHUNK):  # a multiple of every element size
        data = read_range(path, (start, min(start + _CHUNK, info.offsets[1])))
        digest.update(data.data)
        flat = as_tensor(data, info.dtype)
        if flat is None:
            continue
        small, large = _extremes(flat)
        # min() and max() lose a NaN depending on the order; addition keeps it.
        low = small + low if math.isnan(small) or math.isnan(low) else min(low, small)
        high = large + high if math.isnan(large) or math.isnan(high) else max(high, large)
        squares.append(_rms(flat) ** 2)
    matrices = (MatrixScan(low, high, math.sqrt(sum(squares) / len(squares))),) if squares else ()
    return TensorScan(info, digest.hexdigest(), (), matrices)


def _scan_stacked(path: Path, info: TensorInfo, hidden: int | None) -> TensorScan:
    whole, digests, matrices = hashlib.sha256(), [], []
    for offsets in slice_offsets(info):
        data = read_range(path, offsets)
        whole.update(data.data)
        digests.append(hashlib.sha256(data.data).hexdigest())
        matrices.append(_scan_whole(data, info.dtype, info.shape[1:], hidden))
    found = tuple(matrix for matrix in matrices if matrix is not None)
    return TensorScan(info, whole.hexdigest(), tuple(digests), found)


def scan_tensor(folder: Path, info: TensorInfo, hidden: int | None) -> TensorScan:
    """Read one tensor and take its figures.

    Args:
        folder: of the checkpoint.
        info: from a checked header.
        hidden: H, for the profiles of expert matrices.
    """
    path = folder / info.shard
    hidden = hidden if parse_expert_tensor(info.name) is not None else None
    slices = slice_offsets(info)
    if slices and slices[0][1] - slices[0][0] <= _WHOLE:
        return _scan_stacked(path, info, hidden)
    if hidden and info.nbytes <= _WHOLE:
        data = read_range(path, info.offsets)
        one = _scan_whole(data, info.dtype, info.shape, hidden)
        return TensorScan(info, hashlib.sha256(data.data).hexdigest(), (), (one,) if one else ())
    return _scan_chunks(path, info)


def scan(
    folder: Path, tensors: Iterable[TensorInfo], *, hidden: int | None = None, progress: Progress | None = None
) -> dict[str, TensorScan]:
    """Scan tensors in file order, a few side by side; memory stays at a few matrices."""
    infos = list(tensors)
    results: dict[str, TensorScan] = {}
    if progress is not None:
        progress.start("reading", sum(info.nbytes for info in infos))
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for result in pool.map(lambda info: scan_tensor(folder, info, hidden), infos):
            results[result.info.name] = result
            if progress is not None:
                progress.advance(result.info.nbytes)
    if progress is not None:
        progress.finish()
    return results
