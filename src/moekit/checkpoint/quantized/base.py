"""What formats share: how a packed weight is found among the tensors on disk, and what is said where one is broken.

Legend: E experts stacked in one tensor, N rows of a weight (outputs), K columns (inputs).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.names import where
from moekit.errors import BadCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    import torch

WEIGHT = "weight"
SCALE = "scale"
WIDE = frozenset({"F32", "F16", "BF16", "F64"})


@dataclass(frozen=True)
class Beside:
    """A tensor that lies beside a packed weight.

    Attributes:
        role: what it is for.
        suffixes: what its name may end with, in place of the packed weight's ending; the first is the usual one.
        needed: whether the weight cannot be read without it.
    """

    role: str
    suffixes: tuple[str, ...]
    needed: bool = True


@dataclass(frozen=True)
class Packed:
    """A weight, and the tensors on disk that it is read from.

    Attributes:
        name: that it has where nothing is quantized.
        parts: role -> tensor; `WEIGHT` is the packed one.
        shape: of the weight once it is read.
        stacked: whether the first axis of it, and of its parts, counts experts.
        facts: what its format worked out beforehand.
    """

    name: str
    parts: Mapping[str, TensorInfo]
    shape: tuple[int, ...]
    stacked: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


class Format(ABC):
    """A way to pack weights.

    Args:
        settings: the config's `quantization_config`.

    Attributes:
        ending: of a packed weight's name.
        plain_ending: of the weight's name where nothing is quantized.
        beside: what lies beside it.
    """

    ending: ClassVar[str]
    plain_ending: ClassVar[str]
    beside: ClassVar[tuple[Beside, ...]]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def holds(self, info: TensorInfo) -> bool:
        """Whether a tensor is a packed weight of this format."""
        return info.name.endswith(self.ending)

    def find(self, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Packed:
        """The weight that a packed tensor and those beside it make.

        Raises:
            BadCheckpoint: one is missing, or of an impossible shape or dtype: names it, with layer and expert.
            UnsupportedModel: it is packed in a way that cannot be read here.
        """
        stem = info.name.removesuffix(self.ending)
        parts = {WEIGHT: info}
        for part in self.beside:
            names = [stem + suffix for suffix in part.suffixes]
            found = next((name for name in names if name in tensors), None)
            if found is not None:
                parts[part.role] = tensors[found]
            elif part.needed:
                raise broken(info, f"{names[0]} is missing: without it {info.name} is no number")
        return self.described(stem + self.plain_ending, parts)

    @abstractmethod
    def described(self, name: str, parts: Mapping[str, TensorInfo]) -> Packed:
        """Work out a weight's shape from its parts, and refuse parts that do not fit each other."""

    @abstractmethod
    def unpack(self, packed: Packed, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Numbers of a weight, float32, in the shape that it has where nothing is quantized.

        Args:
            packed: the weight.
            parts: role -> tensor as it lies on disk; where it is stacked, the same experts of each.
        """

    def positive(self, part: str) -> bool:
        """Whether numbers of a part must be finite and above zero."""
        return part == SCALE


def broken(info: TensorInfo, what: str, hint: str = "fetch the folder again, or quantize it again") -> BadCheckpoint:
    """The error for a tensor that says too little or contradicts another."""
    layer, expert = where(info.name)
    return BadCheckpoint(what, file=info.shard, layer=layer, expert=expert, hint=hint)


def wrong_shape(info: TensorInfo, *fitting: tuple[int, ...]) -> BadCheckpoint:
    """The error for a tensor of a shape that does not fit what it stands beside."""
    told = " or ".join(str(list(shape)) for shape in dict.fromkeys(fitting))
    return broken(info, f"{info.name} has shape {list(info.shape)} instead of {told}")


def demand_dtype(info: TensorInfo, allowed: frozenset[str]) -> None:
    """Refuse a part of another type than the format has.

    Raises:
        BadCheckpoint: names it.
    """
    if info.dtype not in allowed:
        raise broken(info, f"{info.name} is {info.dtype} instead of {' or '.join(sorted(allowed))}")


def unreadable(what: str) -> UnsupportedModel:
    """The error for a variant of a format that nothing here reads."""
    hint = (
        "give the unquantized checkpoint; a plan that was made on it cuts this one too (moekit apply --other-weights)"
    )
    return UnsupportedModel(what, hint=hint)


def ceil_div(number: int, by: int) -> int:
    """How many pieces of a size it takes."""
    return -(-number // by)
