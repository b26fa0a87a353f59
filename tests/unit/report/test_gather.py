"""What a report says first."""

from __future__ import annotations

import math
from pathlib import Path

from moekit.evaluation.comparison import Evaluation, compare
from moekit.evaluation.documents import PerplexityResult
from moekit.report.gather import report_data
from moekit.report.inputs import ReportInputs
from moekit.report.results import COMPARISON, StepResult


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


def test_a_pruned_model_says_method_experts_bytes_and_proof(tmp_path: Path) -> None:
    text = compare(evaluation("unchanged", 10.0, 20.0), evaluation("reap", 12.0, 23.0))
    results = {
        "method": "reap",
        "settings": {"renormalised": True},
        "experts": {"before": 512, "after": 256},
        "bytes": {"before": 14_000_000_000, "after": 7_500_000_000},
        "proof": {"method": {"text": text.model_dump(mode="json")}, "random": {"mean": 33.25}},
    }
    unproven = {**results, "method": "frequency", "settings": {}, "proof": None}
    finished = tuple(
        StepResult(id=name, use="prune", folder=tmp_path, config={}, results=told)
        for name, told in (("keep-0.5", results), ("quick", unproven), ("text", {"documents": 3}))
    )
    data = report_data(ReportInputs(finished=finished))
    (section,) = [part for part in data.sections if part.title == "Models with fewer experts"]
    first, second = section.tables[0].rows
    assert first[:6] == ("keep-0.5", "reap (renormalised=True)", 256, 512, 7_500_000_000, 14_000_000_000)
    # Two documents of ten tokens each: the mean of the logarithms.
    assert math.isclose(first[6], math.sqrt(12.0 * 23.0))
    assert math.isclose(first[7], math.sqrt(10.0 * 20.0))
    assert math.isclose(first[8].mean, math.sqrt(12.0 * 23.0 / 200.0) - 1)
    assert first[9] == 33.25
    assert second == ("quick", "frequency", 256, 512, 7_500_000_000, 14_000_000_000, None, None, None, None)
