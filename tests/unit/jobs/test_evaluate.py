"""`use: evaluate`: what is wrong is told before the model is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moekit.errors import BadConfig, MoekitError
from moekit.evaluation import questions
from moekit.jobs import evaluate
from moekit.jobs.context import JobContext
from moekit.jobs.options.evaluate import EvaluateOptions
from tests.tiny import write_text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "text", "baseline": "nowhere"}, "evaluation"),
        ({"data": "text", "questions": ("nowhere.json",)}, "nowhere"),
        ({"data": "text", "tasks": ("piqqa",)}, "no task 'piqqa'"),
        ({"data": "./nothing"}, "nothing"),
    ],
)
def test_what_is_missing_is_told_before_the_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was opened first")

    write_text(tmp_path / "text", documents=2)
    monkeypatch.setattr(evaluate, "open_model", opened)
    # lm-eval takes half a minute to list its tasks.
    monkeypatch.setattr(questions, "_known", registry)
    monkeypatch.chdir(tmp_path)
    asked = EvaluateOptions(model="moe", **options)
    with pytest.raises(MoekitError, match=words):
        asked.run(JobContext(out=tmp_path / "out", scratch=tmp_path / "scratch"))


def registry(names: Sequence[str]) -> None:
    raise BadConfig(f"lm-eval has no task {names[0]!r}")


def test_nothing_to_measure_is_refused_by_the_check() -> None:
    with pytest.raises(MoekitError, match="nothing to measure"):
        EvaluateOptions(model="moe").check()
