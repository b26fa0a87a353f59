"""SHA-256 of every tensor's bytes, at the speed of the disk and with a few megabytes of memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moekit._files import open_regular
from moekit._progress import Progress, track
from moekit.checkpoint.experts import stacked_experts
from moekit.checkpoint.record import TensorExpectation
from moekit.checkpoint.safety import TensorInfo, check_name
from moekit.errors import BadCheckpoint

CHUNK_BYTES = 4 << 20
# Files beside the weights that decide what goes in and comes out.
_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*processor*.json")
_GENERATION_FILE = "generation_config.json"
_LONG = 80
# What transformers rewrites in config.json without changing the model.
_VOLATILE = frozenset({"transformers_version", "_name_or_path", "_commit_hash"})


def byte_chunks(path: Path, offsets: tuple[int, int], limit: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Read a byte range with `pread`, at most `limit` bytes at a time.

    Raises:
        BadCheckpoint: the file ends before the range does.
    """
    position, end = offsets
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while position < end:
            chunk = os.pread(descriptor, min(limit, end - position), position)
            if not chunk:
                raise BadCheckpoint("the file became shorter while it was read", file=path, hint="fetch it again")
            yield chunk
            position += len(chunk)
    finally:
        os.close(descriptor)


def read_range(path: Path, offsets: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read a byte range into writable memory of its own.

    Raises:
        BadCheckpoint: the file ends before the range does.
    """
    start, end = offsets
    data = np.empty(end - start, dtype=np.uint8)
    view, position = data.data, 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while position < len(view):
            count = os.preadv(descriptor, [view[position:]], start + position)
            if not count:
                raise BadCheckpoint("the file became shorter while it was read", file=path, hint="fetch it again")
            position += count
    finally:
        os.close(descriptor)
    return data


def file_digest(path: Path, offsets: tuple[int, int]) -> str:
    """SHA-256 of a byte range.

    Raises:
        BadCheckpoint: the file ends before the range does.
    """
    digest = hashlib.sha256()
    for chunk in byte_chunks(path, offsets):
        digest.update(chunk)
    return digest.hexdigest()


def slice_offsets(info: TensorInfo) -> list[tuple[int, int]]:
    """Byte range of each expert in a tensor that stacks them; none for any other tensor."""
    count = stacked_experts(info)
    if not count or info.nbytes % count:
        return []
    size, start = info.nbytes // count, info.offsets[0]
    return [(start + expert * size, start + (expert + 1) * size) for expert in range(count)]


def _stacked_digest(path: Path, info: TensorInfo) -> tuple[str, list[str]]:
    whole, parts = hashlib.sha256(), []
    for offsets in slice_offsets(info):
        part = hashlib.sha256()
        for chunk in byte_chunks(path, offsets):
            whole.update(chunk)
            part.update(chunk)
        parts.append(part.hexdigest())
    return whole.hexdigest(), parts


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
        path = folder / info.shard
        if slice_offsets(info):
            sha256, experts = _stacked_digest(path, info)
            return TensorExpectation(dtype=info.dtype, shape=list(info.shape), sha256=sha256, experts=experts)
        return TensorExpectation(dtype=info.dtype, shape=list(info.shape), sha256=file_digest(path, info.offsets))

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        results = track(pool.map(one, infos), label, progress, total=len(infos))
        return {info.name: result for info, result in zip(infos, results, strict=True)}


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of a config, keys in order, volatile ones left out."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def config_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Every value of a config by its dotted key, as JSON; long ones by their SHA-256, volatile ones left out."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if key in _VOLATILE:
            continue
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{inner}": text for inner, text in config_settings(value).items()}
            continue
        text = json.dumps(value, sort_keys=True)
        found[key] = text if len(text) <= _LONG else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return found


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files beside the weights that decide what goes into the model and what is made of its answers.

    Raises:
        UnsafeInput: a link that leaves the folder.
    """
    names = {file.name for pattern in (*_FILES, _GENERATION_FILE) for file in folder.glob(pattern) if file.is_file()}
    return {name: _whole_digest(check_name(folder, name)) for name in sorted(names)}


def _whole_digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
