"""Open, verify and stream a model folder, local or from the hub."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit._files import open_regular
from moekit.checkpoint.fingerprint import combine, sample_positions
from moekit.checkpoint.hub import resolve
from moekit.checkpoint.names import where
from moekit.checkpoint.record import Record
from moekit.checkpoint.safety import (
    DTYPE_BITS,
    MAX_INDEX_BYTES,
    TensorInfo,
    check_name,
    read_header,
    read_json,
    refuse_foreign_kernels,
    refuse_links_and_adapters,
    refuse_pickles,
    refuse_remote_code,
)
from moekit.checkpoint.sanity import check_config, check_scales
from moekit.errors import BadCheckpoint, MoekitError

if TYPE_CHECKING:
    import torch

    from moekit.checkpoint.layout import Layout

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Tensors up to this size are read whole where only some elements are asked for.
_READ_WHOLE = 1 << 20


def listed(names: list[str], limit: int = 20) -> str:
    """A list for an error message: all names up to `limit`, else the first ones and how many more."""
    head = ", ".join(names[:limit])
    return f"{head} and {len(names) - limit} more" if len(names) > limit else head


class Checkpoint:
    """A model folder whose every file name, header and offset has been checked; no weight has been read.

    Attributes:
        path: the folder.
        config: parsed config.json.
        tensors: by name, in file order, shard by shard.
        shards: file names of the shards.
        record: parsed moekit.json, if there is one.
        remote_code: whether the user allowed code from the repository.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorInfo],
        record: Record | None,
        remote_code: bool = False,
    ):
        self.path = path
        self.remote_code = remote_code
        self.config = config
        self.tensors = tensors
        self.shards = list(dict.fromkeys(info.shard for info in tensors.values()))
        self.record = record

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        allow_remote_code: bool = False,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """Open a local folder, or download a hub model (config, tokenizer and safetensors only) and open it.

        Args:
            model: folder, or hub id "org/name".
            revision: branch, tag or commit of a hub model.
            token: hub token.
            allow_remote_code: accept a model type that needs code from its repository.
            local_files_only: never ask the hub.

        Raises:
            BadCheckpoint: files are missing, damaged, or contradict each other.
            UnsafeInput: pickles only, names that leave the folder, headers that lie.
            UnsupportedModel: needs remote code, or a model type that transformers does not know.
        """
        path = resolve(model, revision=revision, token=token, local_files_only=local_files_only)
        refuse_links_and_adapters(path)
        config = read_json(check_name(path, CONFIG_FILE))
        refuse_remote_code(config, allow=allow_remote_code, revision=revision, file=path / CONFIG_FILE)
        refuse_foreign_kernels(config, allow=allow_remote_code, file=path / CONFIG_FILE)
        check_config(config, path / CONFIG_FILE)
        tensors = read_tensors(path)
        check_scales(config, tensors, path)
        return cls(path, config, tensors, Record.read(path), allow_remote_code)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and 64 evenly spaced elements of each matrix; see `fingerprint`."""
        return combine(self._samples(), self.config)

    @functools.cached_property
    def layout(self) -> Layout:
        """Legal tensors of its class, and where each belongs.

        Raises:
            BadCheckpoint: the config contradicts itself.
            UnsupportedModel: transformers has no class of this type that writes text.
        """
        from moekit.checkpoint.layout import layout_of
        from moekit.checkpoint.meta import meta_model

        return layout_of(meta_model(self))

    @functools.cached_property
    def known_layout(self) -> Layout | None:
        """`layout`; None where no model can be made of the config."""
        try:
            return self.layout
        except MoekitError:
            return None

    def where(self, name: str) -> tuple[int | None, int | None]:
        """Decoder layer and expert that a tensor belongs to, as its class says; by the name alone if there is none."""
        return where(name) if self.known_layout is None else self.known_layout.where(name)

    def _samples(self) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
        for shard in self.shards:
            with open_regular(self.path / shard) as file:
                for info in self.of_shard(shard):
                    yield info.name, info.dtype, info.shape, _sampled(file.fileno(), info)

    def of_shard(self, shard: str) -> list[TensorInfo]:
        """The tensors of one shard, in file order."""
        return [info for info in self.tensors.values() if info.shard == shard]

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            layer, expert = where(name)
            raise BadCheckpoint(
                f"there is no tensor {name!r}", file=self.path, layer=layer, expert=expert, hint="see `moekit check`"
            )
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory.

        Raises:
            BadCheckpoint: no such tensor, or a dtype that torch cannot hold.
        """
        from safetensors import SafetensorError, safe_open

        info = self._info(name)
        try:
            with safe_open(self.path / info.shard, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise _unreadable(self.path / info.shard, name, error) from error
        return tensor

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, shard by shard in file order; one is in memory at a time unless the caller keeps more.

        Raises:
            BadCheckpoint: a dtype that torch cannot hold.
        """
        from safetensors import SafetensorError, safe_open

        for shard in self.shards:
            with safe_open(self.path / shard, framework="pt") as file:
                for info in self.of_shard(shard):
                    try:
                        tensor = file.get_tensor(info.name)
                    except SafetensorError as error:
                        raise _unreadable(self.path / shard, info.name, error) from error
                    yield info.name, tensor


def _unreadable(path: Path, name: str, error: Exception) -> BadCheckpoint:
    layer, expert = where(name)
    return BadCheckpoint(
        f"tensor {name!r} cannot be read: {error}", file=path, layer=layer, expert=expert, hint="fetch the shard again"
    )


def _sampled(file: int, info: TensorInfo) -> bytes:
    """The sampled elements' bytes, by plain reads: pages of a mapped file would count as resident memory."""
    if not info.nbytes:
        return b""
    bits = DTYPE_BITS[info.dtype]
    size, shape = (bits // 8, info.shape) if bits % 8 == 0 else (1, (info.nbytes,))
    positions = sample_positions(shape)
    if info.nbytes <= _READ_WHOLE:
        array = np.frombuffer(os.pread(file, info.nbytes, info.offsets[0]), dtype=np.dtype(f"V{size}"))
        return bytes(array[positions].tobytes())
    starts = (positions * size + info.offsets[0]).tolist()
    if hasattr(os, "posix_fadvise"):
        for start in starts:  # so that the disk is asked for all of them at once
            os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)
    return b"".join(os.pread(file, size, start) for start in starts)


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """Check all shards of a folder and list their tensors.

    As in transformers, `model.safetensors` goes before an index.

    Raises:
        BadCheckpoint: no weights; shards or tensors that the index names are missing, or the other way round.
        UnsafeInput: pickles only, names that leave the folder, headers that lie.
    """
    refuse_pickles(path)
    single = check_name(path, SINGLE_FILE)
    if single.exists():
        return read_header(single).tensors
    index = check_name(path, INDEX_FILE)
    if not index.exists():
        raise BadCheckpoint(
            f"there are no weights: neither {SINGLE_FILE} nor {INDEX_FILE}", file=path, hint="fetch the folder again"
        )
    return _read_indexed(path, read_weight_map(index))


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard name of an index file.

    Raises:
        BadCheckpoint: damaged, or a key given twice.
    """
    weight_map = read_json(index, limit=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise BadCheckpoint("the index has no proper weight_map", file=index, hint="fetch the index again")
    return weight_map


def _read_indexed(path: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    shards = sorted(set(weight_map.values()))
    paths = {shard: check_name(path, shard) for shard in shards}
    missing = [shard for shard in shards if not paths[shard].exists()]
    if missing:
        raise BadCheckpoint(
            f"the index names shards that are missing: {', '.join(missing)}",
            file=path / INDEX_FILE,
            hint="fetch them, or the whole folder, again",
        )
    tensors: dict[str, TensorInfo] = {}
    twice: list[str] = []
    for shard in shards:
        for name, info in read_header(paths[shard]).tensors.items():
            if name in tensors:
                twice.append(f"{name} ({tensors[name].shard}, {shard})")
            tensors[name] = TensorInfo(name, shard, info.dtype, info.shape, info.offsets)
    _compare_index(path / INDEX_FILE, weight_map, tensors, twice)
    return tensors


def _compare_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo], twice: list[str]) -> None:
    problems: dict[str, list[str]] = defaultdict(list)
    problems["in two shards"] = sorted(twice)
    problems["in the index, but in no shard"] = sorted(set(weight_map) - set(tensors))
    problems["in a shard, but not in the index"] = sorted(set(tensors) - set(weight_map))
    problems["in another shard than the index says"] = sorted(
        n for n, shard in weight_map.items() if n in tensors and tensors[n].shard != shard and not twice
    )
    found = {what: names for what, names in problems.items() if names}
    if found:
        first = next(iter(found.values()))[0].split(" ")[0]
        layer, expert = where(first)
        raise BadCheckpoint(
            "index and shards contradict each other: "
            + "; ".join(f"{len(names)} tensors {what}: {listed(names)}" for what, names in found.items()),
            file=index,
            layer=layer,
            expert=expert,
            hint="a stale index or shards of another model: fetch the folder again",
        )
