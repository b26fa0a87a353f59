"""Which families a method is tried on: two kinds of layout and gate, which differ by method.

For weights the families are few kinds: gate and up rows concatenated or alternating, matrices either way round, with
biases or without; for gates a softmax, or sigmoids with a selection bias in groups. What holds for every family is held
by the engine's own tests, and each kind is met by most methods. The other families are marked `full` (and `slow`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from tests.families import FAMILIES

CONTRACT = {
    "qwen3_moe": "concatenated, softmax",
    "deepseek_v3": "sigmoid in groups with a selection bias, shared expert, first layer dense",
    "gpt_oss": "interleaved, transposed, biases",
}


def drawn(name: str, families: Iterable[str] = FAMILIES) -> str:
    """One more family for a method: the same on every machine, and another for another method."""
    return _drawn(name, sorted(set(families) - set(CONTRACT)))


def _drawn(name: str, families: Sequence[str]) -> str:
    number = int.from_bytes(hashlib.sha256(f"{name}|{','.join(families)}".encode()).digest()[:8], "big")
    return families[number % len(families)]


def pair(name: str) -> tuple[str, str]:
    """The two families of the contract that a method is tried on."""
    own = _drawn(name, sorted(CONTRACT))
    return own, _drawn(name, sorted(set(CONTRACT) - {own}))


# Tests that only `make test-all` runs: long ones whose law a quick one holds, too.
FULL = (pytest.mark.full, pytest.mark.slow)


def families(test: str, known: Iterable[str] = FAMILIES) -> list[Any]:
    """Parameters of a test of the engine: all families; those beyond the contract and one that is drawn are marked.

    Args:
        test: its name, by which one more family is drawn.
        known: the families.
    """
    names = sorted(known)
    beyond = [name for name in names if name not in CONTRACT]
    quick = {*CONTRACT, _drawn(test, beyond)} if beyond else set(names)
    return [pytest.param(name, marks=() if name in quick else FULL, id=name) for name in names]


def cases(names: Sequence[str], *further: Sequence[Any], once: bool = False) -> list[Any]:
    """Parameters (name, family, ...) of all methods on all families; those beyond two of the contract are marked.

    Args:
        names: of the methods.
        further: for each parameter behind the family its values; the first are tried on one family of the contract,
            which differs by method, the last on another one.
        once: whether a single family is enough.
    """
    made = []
    for name, family in itertools.product(names, sorted(FAMILIES)):
        for values in itertools.product(*further):
            first, last = (
                all(value == options[end] for value, options in zip(values, further, strict=True)) for end in (0, -1)
            )
            own, other = pair(name)
            quick = (first and family == own) or (last and family == other and not once)
            marks = () if quick else FULL
            label = "-".join(map(str, (name, family, *values)))
            made.append(pytest.param(name, family, *values, marks=marks, id=label))
    return made
