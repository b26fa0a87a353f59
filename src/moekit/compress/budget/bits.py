"""How many bits a weight of the experts gets, and the bytes that a packed form of them takes.

Legend: E experts, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moekit.errors import BadConfig

PartName = Literal["gate", "up", "down"]
PART_NAMES: tuple[PartName, ...] = ("gate", "up", "down")
FEWEST, MOST = 1, 8
# Of a group's scale.
SCALE_BITS = 16


class BitBudget(BaseModel):
    """Bits of the experts' weights.

    Attributes:
        bits: part of an expert -> bits a weight, the same for every expert.
        weights: routed experts' weights that are there; filled in as a plan is made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: dict[PartName, int]
    weights: int | None = Field(default=None, ge=1)

    @field_validator("bits")
    @classmethod
    def _possible(cls, bits: dict[PartName, int]) -> dict[PartName, int]:
        if not bits or not all(FEWEST <= n <= MOST for n in bits.values()):
            raise ValueError(f"bits are {FEWEST} to {MOST}, of one part or more")
        return bits


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


def packed_bits(weights: int, bits: int, group: int) -> int:
    """The same in bits."""
    return weights * bits + -(-weights // group) * (SCALE_BITS + (bits if bits > 1 else 0))


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
