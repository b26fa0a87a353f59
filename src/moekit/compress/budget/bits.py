"""How many bits a weight of the experts gets, and the bytes that a packed form of them takes.

Legend: E experts, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moekit.errors import BadConfig

PartName = Literal["gate", "up", "down"]
PART_NAMES: tuple[PartName, ...] = ("gate", "up", "down")
FEWEST, MOST = 1, 8
# What has one width: each expert, as moekit's own files and AutoRound's can hold it, or each layer, as engines can.
Unit = Literal["expert", "layer"]
WIDTHS = (2, 3, 4)
# Of a group's scale.
SCALE_BITS = 16


class BitBudget(BaseModel):
    """Bits of the experts' weights: the same for all, by part, or a mean that is shared among them.

    Attributes:
        bits: part of an expert -> bits a weight, the same for every expert; empty where a mean is shared.
        mean: bits a weight of all routed experts, at most; None where `bits` says all.
        choices: widths that an expert may get of it, ascending.
        unit: what has one width.
        share: how the mean is shared: settings of a sharer with its name as `use`.
        widths: decoder layer -> bits of each expert; None until the mean has been shared.
        weights: routed experts' weights that are there; filled in as a plan is made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: dict[PartName, int] = Field(default_factory=dict)
    mean: float | None = Field(default=None, ge=FEWEST, le=MOST)
    choices: tuple[int, ...] = ()
    unit: Unit = "expert"
    share: dict[str, Any] = Field(default_factory=dict)
    widths: dict[int, tuple[int, ...]] | None = None
    weights: int | None = Field(default=None, ge=1)

    @field_validator("bits")
    @classmethod
    def _possible(cls, bits: dict[PartName, int]) -> dict[PartName, int]:
        if not all(FEWEST <= n <= MOST for n in bits.values()):
            raise ValueError(f"bits are {FEWEST} to {MOST}")
        return bits

    @model_validator(mode="after")
    def _says_one_thing(self) -> BitBudget:
        if bool(self.bits) == (self.mean is not None):
            raise ValueError("bits are given for every expert, of one part or more, or as a mean")
        if self.mean is not None and not self.choices:
            raise ValueError("a mean is shared among choices")
        return self


def parse_choices(asked: int | str | Sequence[int]) -> tuple[int, ...]:
    """Widths to choose from: numbers, or such as "2,3,4"; ascending, each once.

    Raises:
        BadConfig: no whole number, or outside 1 to 8.
    """
    pieces = str(asked).split(",") if isinstance(asked, int | str) else [str(n) for n in asked]
    found = {piece.strip() for piece in pieces if piece.strip()}
    wrong = [piece for piece in found if not piece.isdigit() or not FEWEST <= int(piece) <= MOST]
    if wrong or not found:
        told = f"{wrong[0]!r} bits are" if wrong else "no widths are"
        raise BadConfig(f"{told} to choose from", hint=f"give whole numbers from {FEWEST} to {MOST}, such as 2,3,4")
    return tuple(sorted(int(piece) for piece in found))


def check_mean(mean: float, choices: Sequence[int]) -> None:
    """Refuse a mean that no share of these widths has.

    Raises:
        BadConfig: names the nearest that one has.
    """
    if not choices[0] <= mean <= choices[-1]:
        told = ", ".join(map(str, choices))
        nearest = choices[0] if mean < choices[0] else choices[-1]
        raise BadConfig(
            f"a mean of {mean:g} bits cannot be had of widths {told}", hint=f"say {nearest}, or give other --choices"
        )


def parse_bits(asked: int | str) -> dict[PartName, int]:
    """Bits of each part: one number for all three, or such as "gate=3,up=3,down=4".

    Raises:
        BadConfig: no such part, no whole number, or bits outside 1 to 8.
    """
    text = str(asked).strip()
    pairs = dict.fromkeys(PART_NAMES, text) if "=" not in text else {}
    for item in text.split(",") if "=" in text else ():
        name, _, value = (piece.strip() for piece in item.partition("="))
        part = next((p for p in PART_NAMES if p == name), None)
        if part is None or part in pairs:
            told = "is given twice" if part else "is no part of an expert"
            raise BadConfig(
                f"bits: {name!r} {told}", hint="such as gate=3,up=3,down=4; parts left out stay as they are"
            )
        pairs[part] = value
    for part, value in pairs.items():
        if not value.isdigit() or not FEWEST <= int(value) <= MOST:
            raise BadConfig(
                f"{value!r} bits are asked for ({part})", hint=f"give a whole number from {FEWEST} to {MOST}"
            )
    return {part: int(value) for part, value in pairs.items()}


def packed_bytes(weights: int, bits: int, group: int) -> int:
    """Bytes of weights packed without gaps, with a scale of 16 bits and a zero point of `bits` bits for each group.

    1 bit has no zero point. Groups of 64 weights of 4 bits take 4 + (16 + 4) / 64 = 4.3125 bits a weight.

    Args:
        weights: how many.
        bits: of each.
        group: weights that share a scale and a zero point.
    """
    return -(-packed_bits(weights, bits, group) // 8)


def packed_bits(weights: int, bits: int, group: int, *, symmetric: bool = False) -> int:
    """The same in bits; symmetric grids need no zero points: groups of 128 weights of 4 bits take 4.125 bits each."""
    zero = bits if bits > 1 and not symmetric else 0
    return weights * bits + -(-weights // group) * (SCALE_BITS + zero)


def check_group(group: int, inputs: Mapping[PartName, int], layer: int | None = None) -> None:
    """Refuse groups that do not divide the inputs of the matrices that are to be rounded.

    Args:
        group: inputs that share a scale; 0 for a whole row.
        inputs: part of an expert -> its inputs.
        layer: decoder layer, for messages.

    Raises:
        BadConfig: names the part, its inputs, and groups that would do.
    """
    for part, columns in inputs.items():
        if group and columns % group:
            fits = [n for n in (32, 64, 128, 256) if all(c % n == 0 for c in inputs.values())]
            told = f"--set group={fits[-1]}, or" if fits else "say"
            raise BadConfig(
                f"groups of {group} do not divide the {columns} inputs of the {part} projection",
                layer=layer,
                hint=f"{told} --set group=0 for one scale a row",
            )
