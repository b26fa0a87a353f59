"""SHA-256 of every tensor's bytes, at the speed of the disk and with a few megabytes of memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moekit._progress import Progress, track
from moekit.checkpoint.record import TensorExpectation
from moekit.checkpoint.safety import TensorInfo
from moekit.errors import BadCheckpoint

_CHUNK = 4 << 20
# What transformers rewrites in config.json without changing the model.
_VOLATILE = frozenset({"transformers_version", "_name_or_path", "_commit_hash"})


def file_digest(path: Path, offsets: tuple[int, int]) -> str:
    """SHA-256 of a byte range, read with `pread` in chunks.

    Raises:
        BadCheckpoint: the file ends before the range does.
    """
    digest = hashlib.sha256()
    position, end = offsets
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while position < end:
            chunk = os.pread(descriptor, min(_CHUNK, end - position), position)
            if not chunk:
                raise BadCheckpoint("the file became shorter while it was read", file=path, hint="fetch it again")
            digest.update(chunk)
            position += len(chunk)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def tensor_digests(
    folder: Path, tensors: Iterable[TensorInfo], *, progress: Progress | None = None, label: str = "hashing"
) -> dict[str, TensorExpectation]:
    """Digests of tensors in file order; a few threads read and hash side by side.

    Args:
        folder: where the shards lie.
        tensors: from checked headers.
        progress: told tensor by tensor.
        label: what it is called there.
    """
    infos = list(tensors)

    def one(info: TensorInfo) -> TensorExpectation:
        sha256 = file_digest(folder / info.shard, info.offsets)
        return TensorExpectation(dtype=info.dtype, shape=list(info.shape), sha256=sha256)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        results = track(pool.map(one, infos), label, progress, total=len(infos))
        return {info.name: result for info, result in zip(infos, results, strict=True)}


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of a config, keys in order, volatile ones left out."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
