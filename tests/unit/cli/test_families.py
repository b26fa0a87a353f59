"""`moekit families`: names are checked at once, the table says what works, and why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moekit
from moekit.cli import families as command
from moekit.cli._terminal import Terminal
from moekit.errors import BadConfig
from tests.commands import Moekit


def _cell(state: str, message: str = "", when: str = "") -> dict[str, object]:
    return {"state": state, "message": message, "when": when, "seconds": 1.0}


def test_an_unknown_name_is_refused_before_anything_is_built(moekit: Moekit) -> None:
    done = moekit("families", "mixtrall")
    assert done.code == 2
    assert done.says("did you mean 'mixtral'")


def test_a_dense_family_is_refused(moekit: Moekit) -> None:
    done = moekit("families", "llama")
    assert done.code == 2
    assert done.says("has no number of experts")


def test_a_dry_run_does_nothing(moekit: Moekit) -> None:
    done = moekit("families", "mixtral", "--dry-run")
    assert done.code == 0
    assert done.says("seconds a family")


def test_only_takes_known_verdicts() -> None:
    with pytest.raises(BadConfig, match="only"):
        moekit.families(["mixtral"], only="good")  # type: ignore[arg-type]


def test_a_reason_is_said_once_for_all_it_is_said_of(capsys: pytest.CaptureFixture[str]) -> None:
    refused = _cell("refused", "no such layout", "before work")
    rows = [
        {"name": name, "class": "X", "cells": {"build": _cell("yes"), "prune": refused, "stock": _cell("untried")}}
        for name in ("one", "two")
    ]
    command.show(
        Terminal(),
        {"transformers": "5.0", "steps": ["build", "prune", "stock"], "families": rows},
    )
    out = capsys.readouterr().out
    assert out.count("no such layout") == 1
    assert "one (prune), two (prune), before work: no such layout" in out
    assert "2 families, 0 of which prune" in out


@pytest.mark.slow
def test_what_is_tried_is_told(moekit: Moekit) -> None:
    done = moekit("families", "dbrx", "mixtral", "--json")
    assert done.code == 0
    told = {row["name"]: {step: cell["state"] for step, cell in row["cells"].items()} for row in done.json["families"]}
    assert set(told["mixtral"].values()) == {"yes"}
    assert told["dbrx"]["build"] == "yes"


@pytest.mark.slow
def test_a_report_is_kept_where_python_asks_for_it(tmp_path: Path) -> None:
    told = moekit.families(["dbrx"], out=tmp_path / "out", progress=False)
    assert told.out == tmp_path / "out"
    assert json.loads((tmp_path / "out" / "families.json").read_text())["families"] == told.families
    assert moekit.families(["dbrx"], only="works", progress=False).families == []
