"""What a report says first."""

from __future__ import annotations

import math
from pathlib import Path

from moekit.evaluation.comparison import Evaluation, compare
from moekit.evaluation.documents import PerplexityResult
from moekit.report.gather import report_data
from moekit.report.inputs import ReportInputs
from moekit.report.results import COMPARISON


def evaluation(name: str, *perplexities: float) -> Evaluation:
    nll = tuple(10 * math.log(value) for value in perplexities)
    text = PerplexityResult(domains=("prose",) * len(nll), tokens=(10,) * len(nll), nll=nll)
    return Evaluation(name=name, perplexity=text)


def said(folder: Path, *pairs: tuple[Evaluation, Evaluation]) -> str:
    folders = []
    for number, (a, b) in enumerate(pairs):
        folders.append(folder / str(number))
        folders[-1].mkdir()
        (folders[-1] / COMPARISON).write_text(compare(a, b).model_dump_json())
    return report_data(ReportInputs(evaluations=tuple(map(str, folders)))).headline.text


def test_one_document_is_compared_without_an_interval(tmp_path: Path) -> None:
    told = said(tmp_path, (evaluation("stock", 201.64), evaluation("half", 209.46)))
    assert told == "From stock to half perplexity 201.64 becomes 209.46; one document gives no interval."


def test_a_comparison_with_an_interval_goes_first(tmp_path: Path) -> None:
    one = evaluation("stock", 201.64), evaluation("half", 209.46)
    two = evaluation("stock", 10.0, 20.0), evaluation("tuned", 9.0, 18.5)
    assert said(tmp_path, one, two).startswith("Against stock, the perplexity of tuned changes by -")
