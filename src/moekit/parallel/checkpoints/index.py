"""`sharded.json`: which tensors a sharded checkpoint holds, in which files, and what must be there.

torch.distributed.checkpoint keeps this in a pickle, which runs code when it is read. Here it is JSON, compared with the
headers of the safetensors files before a weight is read.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import moekit
from moekit._validation import parse
from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.checkpoint.header import DTYPE_BITS
from moekit.checkpoint.provenance import Origin
from moekit.checkpoint.safety import MAX_INDEX_BYTES, TensorInfo, check_name, read_header, read_json
from moekit.errors import BadCheckpoint, BadConfig

INDEX_FILE = "sharded.json"
FORMAT = 1
WEIGHTS, OPTIMIZER = "weights", "optimizer"
_DTYPES = frozenset(TORCH_NAMES.values())
_EXPERT = re.compile(r"(.+)\.(\d+)\.([^.]+)")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Chunk(_Frozen):
    """A box of a tensor, in one file.

    Attributes:
        shard: file name.
        offset: where the box begins in the tensor.
        shape: its sizes.
    """

    shard: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Entry(_Frozen):
    """A tensor.

    Attributes:
        dtype: as safetensors calls it.
        shape: of the whole tensor.
        chunks: boxes that cover it without overlap.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class ExpertsEntry(_Frozen):
    """The experts of one layer.

    Attributes:
        layer: decoder layer.
        count: experts; each has its tensors under `<path>.<id>.<name>`.
        tensors: names.
    """

    layer: int
    count: int = Field(ge=1)
    tensors: tuple[str, ...]


class Index(_Frozen):
    """What a sharded checkpoint holds.

    Attributes:
        format: version of this file's layout.
        moekit: version that wrote it.
        ranks: ranks that wrote it, or that it was rewritten for; any number opens it.
        model_type: as in config.json.
        experts: path of each experts module -> what it must have.
        shards: file name -> bytes.
        tensors: key -> where it lies; keys are `weights/<name>` and `optimizer/<state>/<name>`.
        groups: settings of the optimizer's parameter groups; None without optimizer.
        numbers: optimizer states that are Python numbers.
        extra: what the caller gave.
        files: files beside the shards, for the plain folder.
        source: what the checkpoint that the model was loaded from holds beyond the model, for the plain folder.
    """

    format: int = FORMAT
    moekit: str = Field(default_factory=lambda: moekit.__version__)
    ranks: int
    model_type: str | None = None
    experts: dict[str, ExpertsEntry] = {}
    shards: dict[str, int]
    tensors: dict[str, Entry]
    groups: list[dict[str, Any]] | None = None
    numbers: tuple[str, ...] = ()
    extra: dict[str, Any] = {}
    files: tuple[str, ...] = ()
    source: Origin | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Index:
        """Read a folder's index and compare it with every file's header.

        Raises:
            BadCheckpoint: no sharded checkpoint, damaged, or incomplete; names file, layer and expert.
            UnsafeInput: names that leave the folder, headers that lie.
        """
        folder = Path(folder)
        path = check_name(folder, INDEX_FILE)
        if not path.exists():
            raise BadCheckpoint(
                f"this is no sharded checkpoint: there is no {INDEX_FILE}",
                file=folder,
                hint="a save that was cut off leaves nothing; commands and moekit.load open a plain folder as it is",
            )
        value = read_json(path, limit=MAX_INDEX_BYTES)
        if isinstance(value.get("format"), int) and value["format"] > FORMAT:
            raise BadCheckpoint("a newer moekit wrote this", file=path, hint="upgrade moekit")
        index = parse(cls, value, what="index", file=path, hint="take an earlier checkpoint", kind=BadCheckpoint)
        index.check_experts(path)
        index._check_files(folder)
        return index

    def write(self, folder: Path) -> None:
        """Write the index."""
        atomic_write(folder / INDEX_FILE, self.model_dump_json() + "\n")

    def expert_of(self, key: str) -> tuple[int | None, int | None]:
        """Decoder layer and logical expert that a key belongs to; (None, None) for a dense tensor."""
        found = _EXPERT.fullmatch(key.rpartition("/")[2])
        entry = self.experts.get(found[1]) if found else None
        if found is None or entry is None:
            return None, None
        return entry.layer, int(found[2])

    def first_gap(self) -> tuple[int, int, str] | None:
        """Layer, expert and tensor name of the first expert that is not there; None if all are."""
        for path, entry in self.experts.items():
            for expert in range(entry.count):
                for name in entry.tensors:
                    if f"{WEIGHTS}/{path}.{expert}.{name}" not in self.tensors:
                        return entry.layer, expert, name
        return None

    def check_experts(self, file: Path) -> None:
        """Refuse an index without all experts, or whose boxes do not fill their tensors.

        Raises:
            BadCheckpoint: naming layer and expert.
        """
        gap = self.first_gap()
        if gap is not None:
            raise BadCheckpoint(
                f"its tensor {gap[2]!r} is missing",
                file=file,
                layer=gap[0],
                expert=gap[1],
                hint="take an earlier checkpoint",
            )
        for key, tensor in self.tensors.items():
            if tensor.dtype not in _DTYPES or not _filled(tensor):
                where = self.expert_of(key)
                raise BadCheckpoint(
                    f"the parts of {key!r} do not make up the whole",
                    file=file,
                    layer=where[0],
                    expert=where[1],
                    hint="take an earlier checkpoint",
                )

    def of_shard(self, shard: str) -> dict[str, str]:
        """Tensor names in a file -> keys."""
        return {
            stored_name(key, entry, chunk): key
            for key, entry in self.tensors.items()
            for chunk in entry.chunks
            if chunk.shard == shard
        }

    def _check_files(self, folder: Path) -> None:
        expected: dict[str, dict[str, tuple[str, str, tuple[int, ...]]]] = {shard: {} for shard in self.shards}
        for key, entry in self.tensors.items():
            for chunk in entry.chunks:
                found = expected.setdefault(chunk.shard, {})
                found[stored_name(key, entry, chunk)] = (key, entry.dtype, chunk.shape)
        paths = {shard: check_name(folder, shard) for shard in expected}
        for shard, tensors in expected.items():
            path = paths[shard]
            if not path.exists():
                raise self._missing(folder, shard, next(iter(tensors.values()))[0] if tensors else "")
            try:
                header = read_header(path).tensors
            except BadCheckpoint as error:
                where = self.expert_of(next(iter(tensors.values()))[0]) if tensors else (None, None)
                raise BadCheckpoint(
                    f"{error.message}; it holds {self._holds(shard)}",
                    file=path,
                    layer=where[0],
                    expert=where[1],
                    hint="take an earlier checkpoint",
                ) from error
            self._compare(path, header, tensors)

    def _missing(self, folder: Path, shard: str, key: str) -> BadCheckpoint:
        first = next((k for k in self.of_shard(shard).values() if self.expert_of(k)[1] is not None), key)
        layer, expert = self.expert_of(first)
        return BadCheckpoint(
            f"the shard is missing; it holds {self._holds(shard)}",
            file=folder / shard,
            layer=layer,
            expert=expert,
            hint="bring the file back, or take an earlier checkpoint",
        )

    def _holds(self, shard: str) -> str:
        """What a file holds, for an error."""
        keys = list(self.of_shard(shard).values())
        places = {self.expert_of(key) for key in keys} - {(None, None)}
        layers = sorted({layer for layer, _ in places if layer is not None})
        experts = sorted({expert for _, expert in places if expert is not None})
        if not places:
            return f"{len(keys)} tensors, no experts"
        return f"{len(keys)} tensors: experts {_ranges(experts)} of layers {_ranges(layers)}"

    def _compare(
        self, path: Path, header: dict[str, TensorInfo], tensors: dict[str, tuple[str, str, tuple[int, ...]]]
    ) -> None:
        odd = sorted(header.keys() ^ tensors.keys()) or [
            name
            for name, (_, dtype, shape) in tensors.items()
            if (header[name].dtype, header[name].shape) != (dtype, shape)
        ]
        if odd:
            layer, expert = self.expert_of(tensors[odd[0]][0] if odd[0] in tensors else odd[0])
            raise BadCheckpoint(
                f"file and index contradict each other about {odd[0]!r}",
                file=path,
                layer=layer,
                expert=expert,
                hint="files of two checkpoints were mixed; take one of them whole",
            )


def stored_name(key: str, entry: Entry, chunk: Chunk) -> str:
    """Name of a box in its file: the key, and where the box begins unless it is the whole tensor."""
    return key if chunk.shape == entry.shape else f"{key}@{','.join(map(str, chunk.offset))}"


def _filled(entry: Entry) -> bool:
    """Whether boxes lie inside the tensor and cover it, nothing twice."""
    for chunk in entry.chunks:
        if len(chunk.offset) != len(entry.shape) or len(chunk.shape) != len(entry.shape):
            return False
        if any(
            start < 0 or size < 0 or start + size > whole
            for start, size, whole in zip(chunk.offset, chunk.shape, entry.shape, strict=True)
        ):
            return False
    if sum(math.prod(chunk.shape) for chunk in entry.chunks) != math.prod(entry.shape):
        return False
    # Parts are cut along the first dimension as a rule: neighbours are enough to compare then.
    boxes = sorted(entry.chunks, key=lambda chunk: chunk.offset)
    if all(box.shape[1:] == entry.shape[1:] for box in boxes):
        return all(a.offset[0] + a.shape[0] <= b.offset[0] for a, b in itertools.pairwise(boxes))
    return not any(_overlap(a, b) for a, b in itertools.combinations(boxes, 2))


def _overlap(a: Chunk, b: Chunk) -> bool:
    return all(s < t + n and t < s + m for s, m, t, n in zip(a.offset, a.shape, b.offset, b.shape, strict=True))


def _ranges(numbers: list[int]) -> str:
    """`0-3, 6`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def refuse_other(model_type: str | None, index: Index, folder: Path) -> None:
    """Refuse a model of another type.

    Raises:
        BadConfig: naming both.
    """
    if model_type != index.model_type:
        raise BadConfig(
            f"the checkpoint is of a {index.model_type} model, not of a {model_type}",
            file=folder,
            hint="load it into the model it was saved from",
        )
