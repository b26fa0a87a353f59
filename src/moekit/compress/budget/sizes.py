"""How many experts may stay: a count, a fraction or bytes, the same in every layer or wherever they are worth most."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moekit.errors import BadConfig

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE)


def bytes_in(text: str) -> int | None:
    """A number of bytes, such as 12GiB; None where a text says none."""
    match = _BYTES.fullmatch(text)
    return None if match is None else int(float(match[1]) * _UNITS[match[2].upper()])


class Budget(BaseModel):
    """What may stay.

    Attributes:
        keep: experts a layer (an integer from 1), their fraction (above 0, at most 1.0; "1/2" is 0.5), or bytes of the
            whole checkpoint ("12GiB").
        scope: "uniform" keeps equally many in each layer, which stock transformers loads; "global" keeps them where
            they are worth most, which needs moekit.load.
        least: fewest a layer keeps with "global"; at least the choices a token makes.
        most: most a layer keeps with "global"; all by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: int | float | str = Field(description="experts a layer, their fraction, or bytes of the checkpoint (12GiB)")
    scope: Literal["uniform", "global"] = "uniform"
    least: int | None = Field(default=None, ge=1)
    most: int | None = Field(default=None, ge=1)

    @field_validator("keep", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, str):
            text = value.strip()
            if re.fullmatch(r"\d+", text):
                value = int(text)
            elif re.fullmatch(r"\d*\.\d+", text) or re.fullmatch(r"\d+\.", text):
                value = float(text)
            elif re.fullmatch(r"\d+\s*/\s*0*[1-9]\d*", text):
                value = float(Fraction(text.replace(" ", "")))
            elif bytes_in(text) is None:
                raise ValueError(f"{value!r} is no count, no fraction and no size such as 12GiB")
        if isinstance(value, bool) or (isinstance(value, int) and value < 1):
            raise ValueError("a count is at least 1")
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError("a fraction lies above 0 and is at most 1.0")
        return value

    @property
    def max_bytes(self) -> int | None:
        """The limit in bytes, if one is given."""
        return bytes_in(self.keep) if isinstance(self.keep, str) else None


@dataclass(frozen=True)
class ByteSizes:
    """What a budget is counted against.

    Attributes:
        experts: decoder layer -> E.
        top_k: choices a token makes; no layer may keep fewer.
        expert_bytes: decoder layer -> bytes of one expert.
        other_bytes: bytes of all that is no routed expert.
    """

    experts: Mapping[int, int]
    top_k: int
    expert_bytes: Mapping[int, int]
    other_bytes: int


def uniform_count(budget: Budget, sizes: ByteSizes) -> dict[int, int]:
    """Experts that each layer keeps, by the same count or fraction everywhere.

    Raises:
        BadConfig: fewer than the choices a token makes, more than there are, or the bytes do not suffice; names the
            nearest legal value.
    """
    limit = budget.max_bytes
    if limit is not None:
        counts = _by_bytes(limit, sizes)
    elif isinstance(budget.keep, float):
        # As many are dropped as the fraction asks for at least, never more: 0.5 of 7 keeps 4.
        counts = {layer: e - int(e * (1 - budget.keep) + 1e-9) for layer, e in sizes.experts.items()}
    else:
        assert isinstance(budget.keep, int)
        counts = dict.fromkeys(sizes.experts, budget.keep)
    for layer, count in counts.items():
        check_count(count, sizes.experts[layer], sizes.top_k, layer)
    return counts


def check_count(count: int, experts: int, top_k: int, layer: int) -> None:
    """Refuse a count that a layer cannot have.

    Raises:
        BadConfig: names layer and nearest legal value.
    """
    if count < top_k:
        raise BadConfig(
            f"{count} of {experts} experts would stay, but every token chooses {top_k}",
            layer=layer,
            hint=f"keep at least {top_k}, or lower the choices too (--top-k {max(count, 1)})",
        )
    if count > experts:
        raise BadConfig(
            f"{count} experts are to stay, but there are {experts}", layer=layer, hint=f"keep at most {experts}"
        )


def _by_bytes(limit: int, sizes: ByteSizes) -> dict[int, int]:
    def total(count: int) -> int:
        return sizes.other_bytes + sum(min(count, e) * sizes.expert_bytes[layer] for layer, e in sizes.experts.items())

    most = max(sizes.experts.values())
    count = next((c for c in range(most, 0, -1) if total(c) <= limit), 0)
    if count < sizes.top_k:
        raise BadConfig(
            f"{limit:,} bytes do not hold {sizes.top_k} experts a layer, which every token chooses",
            hint=f"allow at least {total(sizes.top_k):,} bytes",
        )
    return {layer: min(count, e) for layer, e in sizes.experts.items()}


def total_count(budget: Budget, sizes: ByteSizes) -> int:
    """Experts that all layers keep together.

    Raises:
        BadConfig: see `uniform_count`.
    """
    limit = budget.max_bytes
    if limit is None:
        return sum(uniform_count(budget, sizes).values())
    most = max(sizes.expert_bytes.values())
    count = (limit - sizes.other_bytes) // most
    least = sizes.top_k * len(sizes.experts)
    if count < least:
        raise BadConfig(
            f"{limit:,} bytes do not hold {sizes.top_k} experts a layer, which every token chooses",
            hint=f"allow at least {sizes.other_bytes + least * most:,} bytes",
        )
    return min(count, sum(sizes.experts.values()))


def check_total(total: int, least: int, most: int, sizes: ByteSizes) -> None:
    """Refuse a number of experts of all layers that bounds of each layer do not allow.

    Raises:
        BadConfig: naming what they allow.
    """
    lowest = sum(min(least, experts) for experts in sizes.experts.values())
    highest = sum(min(most, experts) for experts in sizes.experts.values())
    if not lowest <= total <= highest:
        raise BadConfig(
            f"{total} experts of all layers cannot stay where each layer keeps {least} to {most}",
            hint=f"with these bounds {lowest} to {highest} can",
        )


def bounds(budget: Budget, sizes: ByteSizes) -> tuple[int, int]:
    """Fewest and most that a layer keeps with the scope "global".

    Raises:
        BadConfig: the bounds contradict each other or the choices a token makes.
    """
    least = sizes.top_k if budget.least is None else budget.least
    most = max(sizes.experts.values()) if budget.most is None else budget.most
    if not sizes.top_k <= least <= most:
        raise BadConfig(
            f"a layer cannot keep between {least} and {most} experts",
            hint=f"at least {sizes.top_k}, which every token chooses, and least <= most",
        )
    return least, most
