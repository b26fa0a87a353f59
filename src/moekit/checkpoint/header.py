"""A strict parser of safetensors headers, so that every offset can be trusted before any library reads the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit._files import open_regular, require_regular
from moekit.checkpoint.strictjson import parse_json
from moekit.errors import BadCheckpoint, UnsafeInput

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
MAX_NAME = 1000
# Beyond it no machine's memory reaches, and products of sizes overflow 64 bits once they count bytes.
_MOST_ELEMENTS = 2**59

# Bits per element of every dtype the safetensors format knows.
DTYPE_BITS: dict[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
FLOAT_DTYPES = frozenset(name for name in DTYPE_BITS if name.startswith(("F", "BF")))


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its shard's header states it.

    Attributes:
        name: tensor name.
        shard: file name within the folder.
        dtype: safetensors dtype ("BF16", "F32", ...).
        shape: sizes.
        offsets: first byte and byte after the last, counted from the start of the file.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.offsets[1] - self.offsets[0]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return _product(self.shape)


@dataclass(frozen=True)
class Header:
    """A shard's header: its tensors in file order, and the free-text metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _integers(value: Any, length: int | None = None) -> tuple[int, ...] | None:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        return None
    if not all(type(item) is int and 0 <= item < 2**63 for item in value):
        return None
    return tuple(value)


def _tensor(name: str, entry: Any, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or not set(entry) == {"dtype", "shape", "data_offsets"}:
        raise UnsafeInput(f"the header entry of {name!r} is malformed", file=path, hint="do not use this file")
    if len(name) > MAX_NAME:
        raise UnsafeInput(
            f"the tensor name {name!r} has {len(name)} characters", file=path, hint="do not use this file"
        )
    dtype, shape, offsets = entry["dtype"], _integers(entry["shape"]), _integers(entry["data_offsets"], 2)
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise UnsafeInput(
            f"tensor {name!r} has the unknown dtype {dtype!r}",
            file=path,
            hint=f"known are {', '.join(DTYPE_BITS)}",
        )
    # Sizes beside a zero count, too: libraries multiply them before they see the zero.
    huge = shape is not None and _product(tuple(max(1, size) for size in shape)) >= _MOST_ELEMENTS
    if shape is None or huge or len(shape) > MAX_DIMENSIONS or offsets is None or offsets[1] < offsets[0]:
        raise UnsafeInput(f"tensor {name!r} has an impossible shape or offsets", file=path, hint="do not use this file")
    bits = _product(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise UnsafeInput(
            f"tensor {name!r} of shape {list(shape)} and dtype {dtype} needs {bits / 8:g} bytes, but its offsets span "
            f"{offsets[1] - offsets[0]}",
            file=path,
            hint="do not use this file",
        )
    return dtype, shape, offsets[0], offsets[1]


def _header_bytes(path: Path, size: int) -> bytes:
    with open_regular(path) as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BadCheckpoint(
                f"truncated: {size} bytes are too few for a safetensors file", file=path, hint="fetch the shard again"
            )
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise UnsafeInput(
                f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are legal",
                file=path,
                hint="this is no safetensors file, or a hostile one",
            )
        if length > size - 8:
            raise BadCheckpoint(
                f"truncated: the header has {length} bytes, the whole file only {size}",
                file=path,
                hint="fetch the shard again",
            )
        return file.read(length)


def read_header(path: str | Path) -> Header:
    """Parse and check a safetensors header, so that every offset can be trusted afterwards.

    Raises:
        BadCheckpoint: the file is missing or truncated.
        UnsafeInput: the header claims too many bytes, is malformed, names a dtype that does not exist, or its offsets
            overlap, leave holes or contradict the shapes.
    """
    path = Path(path)
    try:
        size = require_regular(path).st_size
    except OSError:
        raise BadCheckpoint("the shard is missing", file=path, hint="fetch the model folder again") from None
    raw = _header_bytes(path, size)
    if not raw.startswith(b"{"):
        raise UnsafeInput("the header is no JSON object", file=path, hint="this is no safetensors file")
    entries = parse_json(raw, path, what="the header", error=UnsafeInput)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UnsafeInput("the header's metadata is malformed", file=path, hint="do not use this file")
    found = sorted(
        (
            (start, end, name, dtype, shape)
            for name, entry in entries.items()
            for dtype, shape, start, end in [_tensor(name, entry, path)]
        ),
        key=lambda item: item[:2],
    )
    position = 0
    for start, end, name, _, _ in found:
        if start != position:
            what = (
                "overlaps its neighbour" if start < position else f"leaves a hole of {start - position} bytes before it"
            )
            raise UnsafeInput(f"tensor {name!r} {what}", file=path, hint="do not use this file")
        position = end
    data = 8 + len(raw)
    if data + position > size:
        raise BadCheckpoint(
            f"truncated: the header describes {data + position} bytes, the file has {size}",
            file=path,
            hint="fetch the shard again",
        )
    if data + position < size:
        raise UnsafeInput(
            f"{size - data - position} bytes after the last tensor belong to nothing",
            file=path,
            hint="do not use this file",
        )
    tensors = {
        name: TensorInfo(name, path.name, dtype, shape, (data + start, data + end))
        for start, end, name, dtype, shape in found
    }
    return Header(tensors, dict(metadata), size)


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, its header checked first.

    Raises:
        BadCheckpoint: the file is missing, truncated, or holds a dtype that torch lacks.
        UnsafeInput: see `read_header`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, RuntimeError, LookupError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"its tensors cannot be read: {error}", file=path, hint="make the file again") from error
    return tensors
