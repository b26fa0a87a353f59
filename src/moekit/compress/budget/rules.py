"""What becomes of tensors that belong to no routed expert: attention, shared experts, dense layers, embeddings.

A rule names tensors by a pattern over their names on disk, and gives them bits or rows. The first rule that fits a
tensor counts, as in a list of overrides; tensors that none fits stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moekit.anatomy.layout import parse_expert_tensor
from moekit.checkpoint.safety import DTYPE_BITS, TensorInfo
from moekit.compress.budget.bits import packed_bytes
from moekit.errors import BadConfig


class TensorRule(BaseModel):
    r"""A pattern, and what becomes of the tensors that fit it.

    Attributes:
        pattern: regular expression, found anywhere in a tensor's name (`self_attn\.[qk]_proj`).
        bits: bits a weight from now on; None as before.
        group: weights that share a scale and a zero point, where `bits` is given.
        rows: rows (outputs) from now on; None as before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = Field(min_length=1)
    bits: int | None = Field(default=None, ge=1, le=16)
    group: int = Field(default=128, ge=1)
    rows: int | None = Field(default=None, ge=1)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _says_something(self) -> TensorRule:
        if self.bits is None and self.rows is None:
            raise ValueError(f"the rule for {self.pattern!r} says neither bits nor rows")
        return self

    def fits(self, name: str) -> bool:
        """Whether a tensor's name fits."""
        return re.search(self.pattern, name) is not None

    def nbytes(self, info: TensorInfo) -> int:
        """Bytes of a tensor under this rule."""
        shape = info.shape if self.rows is None else (self.rows, *info.shape[1:])
        if self.bits is None:
            return prod(shape) * DTYPE_BITS[info.dtype] // 8
        return packed_bytes(prod(shape), self.bits, self.group)


def matched(rules: Sequence[TensorRule], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorRule]:
    """Tensor name -> the rule that counts for it.

    Raises:
        BadConfig: a rule that fits no tensor, fits routed experts, which outcomes speak of, or asks for more rows than
            there are or bits of a vector; names the tensor.
    """
    found: dict[str, TensorRule] = {}
    for rule in rules:
        fitting = [name for name in tensors if rule.fits(name)]
        if not fitting:
            raise BadConfig(f"no tensor fits {rule.pattern!r}", hint=f"names look like {', '.join(list(tensors)[:3])}")
        for name in fitting:
            _check(rule, tensors[name])
            found.setdefault(name, rule)
    return found


def _check(rule: TensorRule, info: TensorInfo) -> None:
    hint = f"make the pattern {rule.pattern!r} narrower"
    if parse_expert_tensor(info.name) is not None:
        raise BadConfig(f"the rule fits {info.name}, which belongs to a routed expert", hint=hint)
    if len(info.shape) != 2:
        raise BadConfig(f"the rule fits {info.name} of shape {list(info.shape)}, which is no matrix", hint=hint)
    if rule.rows is not None and rule.rows > info.shape[0]:
        raise BadConfig(
            f"{rule.rows} rows are to stay of {info.name}, which has {info.shape[0]}",
            hint=f"say at most {info.shape[0]}",
        )


def ruled_bytes(rules: Sequence[TensorRule], tensors: Iterable[TensorInfo]) -> int:
    """Bytes of tensors once the rules have been followed.

    Args:
        rules: as for `matched`.
        tensors: of the checkpoint, or a part of it.

    Raises:
        BadConfig: see `matched`.
    """
    known = {info.name: info for info in tensors}
    found = matched(rules, known) if rules else {}
    return sum(found[name].nbytes(info) if name in found else info.nbytes for name, info in known.items())
