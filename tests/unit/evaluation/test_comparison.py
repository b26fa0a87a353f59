from __future__ import annotations

import math

import pytest

from moekit.errors import BadConfig, BadData
from moekit.evaluation.comparison import Evaluation, compare
from moekit.evaluation.documents import PerplexityResult
from moekit.evaluation.questions import Metric, TaskResult


def text(*nll, tokens=(10, 10, 20, 20, 0)):
    return PerplexityResult(domains=("de", "de", "en", "en", "none"), tokens=tokens, nll=(*nll, 0.0))


def task(name, answers, questions="q", metric="acc", **more):
    value = sum(answers) / len(answers)
    metrics = {metric: Metric(value=value, standard_error=0.1, answers=tuple(map(float, answers))), **more}
    return TaskResult(task=name, n=len(answers), metrics=metrics, questions=questions)


def test_text_is_compared_per_domain_and_overall():
    a = Evaluation(name="base", perplexity=text(20.0, 30.0, 40.0, 60.0))
    b = Evaluation(name="c2r", perplexity=text(21.0, 33.0, 40.0, 60.0))
    result = compare(a, b)
    assert (result.a, result.b) == ("base", "c2r")
    assert [d.domain for d in result.domains] == ["de", "en"], "nothing was scored in the third"
    german, english = result.domains
    assert german.a.perplexity == pytest.approx(math.exp(2.5))
    assert german.b.perplexity == pytest.approx(math.exp(2.7))
    assert german.difference.ratio == pytest.approx(math.exp(0.2))
    assert (english.difference.mean, english.difference.ratio, english.difference.p_value) == (0, 1, 1)
    assert result.overall.domain == "all"
    assert result.overall.difference.mean == pytest.approx(4 / 60)
    assert result.overall.difference.n == 4
    assert result.tasks == ()
    assert result.tasks_mean is None


def test_a_single_document_has_no_interval():
    one = PerplexityResult(domains=("x",), tokens=(3,), nll=(6.0,))
    result = compare(Evaluation(name="a", perplexity=one), Evaluation(name="b", perplexity=one))
    assert result.overall.difference is None
    assert result.overall.a.low is None


def test_tasks_are_paired_by_question():
    a = Evaluation(name="a", tasks=(task("x", [1, 0, 1, 0]), task("y", [1, 1]), task("only a", [1, 0])))
    b = Evaluation(name="b", tasks=(task("y", [0, 1]), task("x", [1, 1, 1, 0])))
    result = compare(a, b)
    assert [t.task for t in result.tasks] == ["x", "y"]
    x, y = result.tasks
    assert (x.a, x.b, x.n, x.metric) == (0.5, 0.75, 4, "acc")
    assert x.difference.mean == 0.25
    assert (x.test.only_a, x.test.only_b) == (0, 1)
    assert (y.test.only_a, y.test.only_b) == (1, 0)
    assert result.tasks_mean.mean == pytest.approx((0.25 - 0.5) / 2), "each task weighs the same"
    assert result.overall is None


def test_the_normalised_metric_goes_first_and_fractions_have_no_mcnemar():
    norm = Metric(value=0.5, standard_error=None, answers=(0.5, 0.5))
    one = Evaluation(name="a", tasks=(task("x", [1, 0], acc_norm=norm),))
    [x] = compare(one, one).tasks
    assert x.metric == "acc_norm"
    assert x.test is None


def test_other_text_or_questions_are_refused():
    a = Evaluation(name="a", perplexity=text(1.0, 1.0, 1.0, 1.0), tasks=(task("x", [1, 0]),))
    other = text(1.0, 1.0, 1.0, 1.0, tokens=(10, 10, 20, 21, 0))
    with pytest.raises(BadConfig, match="different text"):
        compare(a, Evaluation(name="b", perplexity=other))
    with pytest.raises(BadData, match="different questions of x"):
        compare(a, Evaluation(name="b", tasks=(task("x", [1, 0], questions="others"),)))
    with pytest.raises(BadData, match="anything in common"):
        compare(a, Evaluation(name="b", tasks=(task("z", [1, 0]),)))


def test_results_survive_json():
    a = Evaluation(name="a", perplexity=text(1.0, 1.5, 1.0, 1.0), tasks=(task("x", [1, 0]),))
    result = compare(a, a)
    assert type(result).model_validate_json(result.model_dump_json()) == result
    assert Evaluation.model_validate_json(a.model_dump_json()) == a
