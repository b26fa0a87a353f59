"""A method's pydantic fields as command-line options."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, Field

from moekit.cli._command import build_command
from moekit.cli._options import describe, option_parameters, parse_value, read_options, type_name
from moekit.cli._terminal import Terminal
from moekit.errors import BadConfig
from tests.commands import Moekit


class Knobs(BaseModel):
    """Knobs of every kind."""

    top_t: int = Field(ge=1, le=31, description="partners")
    rate: float | None = Field(default=None, gt=0, description="share, per token")
    mode: Literal["list", "device"] = "list"
    exact: bool = False
    layers: list[int] = []
    keep: int | float = 8
    note: str = ""
    seed: int = 3


def call(*args: str) -> dict[str, object]:
    seen: dict[str, object] = {}
    extra = option_parameters(Knobs, taken=("seed",))

    def command(terminal: Terminal, **values: object) -> None:
        seen.update(read_options(Knobs, values), common_seed=terminal.seed)

    build_command(command, examples=["x"], extra=extra).main(args=list(args), standalone_mode=False)
    return seen


def test_only_what_was_given_reaches_the_method() -> None:
    assert call("--top-t", "4") == {"top_t": 4, "common_seed": 0}


def test_every_kind_of_field() -> None:
    seen = call(
        *("--top-t", "4", "--rate", "0.5", "--mode", "device", "--exact", "--layers", "[1, 2]"),
        *("--keep", "0.25", "--note", "12", "--method-seed", "9", "--seed", "1"),
    )
    assert Knobs.model_validate({k: v for k, v in seen.items() if k != "common_seed"}) == Knobs(
        top_t=4, rate=0.5, mode="device", exact=True, layers=[1, 2], keep=0.25, note="12", seed=9
    )
    assert seen["common_seed"] == 1


def test_a_required_option_is_asked_for() -> None:
    with pytest.raises(Exception, match="top_t"):
        call()


def test_help_says_units_bounds_and_default() -> None:
    assert describe(Knobs.model_fields["top_t"]) == "partners (≥ 1, ≤ 31)"
    assert describe(Knobs.model_fields["rate"]) == "share, per token (> 0)"
    assert describe(Knobs.model_fields["mode"]) == "(default: list)"


def test_type_names() -> None:
    names = {name: type_name(field.annotation) for name, field in Knobs.model_fields.items()}
    assert names["mode"] == "one of list, device"
    assert names["rate"] == "float or nothing"
    assert names["keep"] == "int or float"


def test_a_value_that_is_no_yaml() -> None:
    with pytest.raises(BadConfig, match="--layers"):
        parse_value("[1, ", option="layers")


def test_a_method_with_a_mapping_is_described_in_words(moekit: Moekit) -> None:
    told = moekit("methods", "prune", "--markdown").out
    assert "| `domain_weights` | dict[str, float] |" in told
    assert "Undefined" not in told
    assert "FieldInfo" not in told
