"""How wide experts become: neurons, a share of them, or what a number of bytes leaves room for.

Legend: I width of an expert before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from pydantic import BaseModel, ConfigDict, Field

from moekit.compress.budget.sizes import bytes_in
from moekit.errors import BadConfig

# Kernels want widths that whole tiles divide; narrow experts get at least so many steps of a multiple.
MULTIPLE, STEPS = 64, 8
_HINT = "neurons (384), a share of them (1/2, 0.5), or bytes of the whole model (--bytes 12GiB)"


class WidthBudget(BaseModel):
    """Neurons of every expert from now on, the same in all layers.

    Attributes:
        width: how many.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(ge=1)


def multiple_for(before: int, asked: int | None = None) -> int:
    """What a width is to be a multiple of.

    Args:
        before: I.
        asked: by the user; None for the largest power of two up to 64 of which eight or more fit into I.
    """
    if asked is not None:
        return asked
    made = MULTIPLE
    while made > 1 and made * STEPS > before:
        made //= 2
    return made


def parse_width(asked: int | float | str) -> int | Fraction:
    """Neurons, or a share of them.

    Raises:
        BadConfig: neither, or an impossible share.
    """
    text = str(asked).strip()
    if re.fullmatch(r"\d+", text) and not isinstance(asked, float):
        if int(text) < 1:
            raise BadConfig("experts without neurons are asked for", hint=_HINT)
        return int(text)
    if not re.fullmatch(r"\d*\.?\d+(e-?\d+)?|\d+\.|\d+\s*/\s*\d+", text):
        raise BadConfig(f"a width of {text!r} is asked for", hint=_HINT)
    try:
        share = Fraction(text.replace(" ", ""))
    except ZeroDivisionError:
        share = Fraction(0)
    if not 0 < share <= 1:
        raise BadConfig(f"a share of {text} of the neurons is asked for", hint="a share lies above 0 and is at most 1")
    return share


def width_for(asked: int | float | str, before: int, multiple: int) -> int:
    """Neurons that experts keep.

    Args:
        asked: see `parse_width`; a share is rounded to the nearest multiple, of two equally near ones to the larger.
        before: I.
        multiple: see `multiple_for`; a width that leaves every neuron is legal whatever it is.

    Raises:
        BadConfig: more neurons than there are, or a number that is no multiple; names the nearest that is.
    """
    wanted = parse_width(asked)
    if isinstance(wanted, int):
        if wanted > before:
            raise BadConfig(f"experts of {before} neurons cannot become {wanted} wide", hint=f"keep at most {before}")
        if wanted % multiple and wanted != before:
            near = _nearest(Fraction(wanted), before, multiple)
            raise BadConfig(
                f"{wanted} neurons are no multiple of {multiple}",
                hint=f"ask for {near}, or for other multiples (--set multiple=1 allows any width)",
            )
        return wanted
    return _nearest(wanted * before, before, multiple)


def _nearest(exact: Fraction, before: int, multiple: int) -> int:
    steps = int(exact / multiple + Fraction(1, 2))
    return min(before, max(1, steps) * multiple)


def parse_bytes(asked: str) -> int:
    """A number of bytes, such as 12GiB.

    Raises:
        BadConfig: it is none.
    """
    found = bytes_in(asked)
    if found is None:
        raise BadConfig(f"{asked!r} is no size", hint="such as 12GiB or 800MB, of the whole model")
    return found


def width_for_bytes(limit: int, before: int, multiple: int, nbytes: Callable[[int], int]) -> int:
    """The widest experts with which a model is not larger than so many bytes.

    Args:
        limit: bytes.
        before: I.
        multiple: see `multiple_for`.
        nbytes: width -> bytes of the whole model; more for wider experts.

    Raises:
        BadConfig: not even one step of the multiple fits.
    """
    if nbytes(before) <= limit:
        return before
    least, most = 0, -(-before // multiple)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if nbytes(middle * multiple) <= limit else (least, middle)
    if not least:
        raise BadConfig(
            f"{limit:,} bytes do not hold experts of {multiple} neurons",
            hint=f"allow at least {nbytes(min(multiple, before)):,} bytes, or fewer neurons (--set multiple=1)",
        )
    return least * multiple
