from __future__ import annotations

import builtins
import copy
import logging
import sys
from dataclasses import dataclass

import lm_eval
import pytest
from datasets import Dataset, DatasetDict
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from moekit.data.question_formats import asked
from moekit.errors import BadConfig, BadData, NumericFault, UnsafeInput
from moekit.evaluation import _lm_eval, questions
from moekit.evaluation.questions import choices
from tests.families import build


@dataclass(frozen=True)
class Question:
    context: str
    choices: list[str]
    answer: int
    task: str


def some(n=12, task="colours"):
    return [
        Question(
            f"Q{i}: what is {i * 7 % 5}?\nAnswer:", [" red", " dark green {{7*7}}", " ok"][: 2 + i % 2], i % 2, task
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def model():
    return build("qwen2_moe")


def by_stock_lm_eval(model, tokenizer, asked):
    """The same questions through lm-eval's own model wrapper, nothing of ours but the task."""
    task = _lm_eval.LocalTask("t", asked)
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=3, softmax_dtype="float32")
    return evaluator.evaluate(lm, {"t": task}, bootstrap_iters=10)


def test_numbers_are_those_of_stock_lm_eval(model, tokenizer):
    asked = some(14)
    [ours] = choices(model, tokenizer, asked, name="m")
    stock = by_stock_lm_eval(model, tokenizer, asked)
    assert ours.n == 14
    assert (ours.task, ours.model, ours.lm_eval) == ("colours", "m", lm_eval.__version__)
    for metric in ("acc", "acc_norm"):
        assert ours.metrics[metric].value == stock["results"]["t"][f"{metric},none"]
        assert ours.metrics[metric].standard_error == pytest.approx(stock["results"]["t"][f"{metric}_stderr,none"])
        assert list(ours.metrics[metric].answers) == [s[metric] for s in stock["samples"]["t"]]
    assert 0 < sum(ours.metrics["acc"].answers) < 14, "a test where all answers are alike shows nothing"


def test_likelihoods_are_those_of_stock_lm_eval(model, tokenizer):
    asked = [*some(6), Question("", [" ab", " ba"], 0, "t"), Question("same ", ["a", "b", "c", "b"], 0, "t")]
    task = _lm_eval.LocalTask("t", asked)
    task.build_all_requests()
    stock = HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=2, softmax_dtype="float32"
    ).loglikelihood(task.instances, disable_tqdm=True)
    lm = _lm_eval.ScorerLM(model, copy.deepcopy(tokenizer), batch_tokens=64, progress=None)
    ours = lm.loglikelihood(task.instances)
    assert len(ours) == sum(len(q.choices) for q in asked)
    for (x, greedy), (y, greedy_too) in zip(stock, ours, strict=True):
        assert y == pytest.approx(x, rel=1e-5)
        assert greedy_too == greedy


def test_answers_of_one_token_share_a_forward(model, tokenizer):
    windows, members = _lm_eval._share([([1, 2], [3]), ([1, 2], [4]), ([1, 2], [3, 4]), ([1], [2, 5])], 100)
    assert members == [[0, 1], [2], [3]]
    assert list(windows[0].inputs) == [1, 2]
    assert (windows[0].positions, windows[0].targets) == ([1, 1], [3, 4])
    assert (windows[1].positions, windows[1].targets) == ([1, 2], [3, 4])
    assert (windows[2].positions, windows[2].targets) == ([0, 1], [2, 5])


def test_too_long_requests_are_cut_on_the_left_as_lm_eval_does():
    [window], _ = _lm_eval._share([([1, 2, 3, 4], [5, 6])], 3)
    assert list(window.inputs) == [3, 4, 5]
    assert (window.positions, window.targets) == ([1, 2], [5, 6])


def test_tasks_are_kept_apart_and_limited(model, tokenizer):
    results = choices(model, tokenizer, [*some(5, "one"), *some(7, "two")], limit=3)
    assert [(r.task, r.n) for r in results] == [("one", 3), ("two", 3)]
    whole = choices(model, tokenizer, some(7, "two"))
    assert whole[0].metrics["acc"].answers[:3] == results[1].metrics["acc"].answers
    assert whole[0].questions != results[1].questions


def test_the_tokenizer_and_the_mode_stay_as_they_were(tokenizer):
    model = build("mixtral").train()
    choices(model, tokenizer, some(2))
    assert model.training
    assert tokenizer.pad_token is None


def test_templates_in_questions_are_text():
    task = _lm_eval.LocalTask("t", [Question("{{ 7*7 }} choices", [" context", " {% raw %}"], 0, "t")] * 2)
    task.build_all_requests()
    assert task.instances[0].args == ("{{ 7*7 }} choices", " context")
    assert task.instances[1].args == ("{{ 7*7 }} choices", " {% raw %}")


@pytest.mark.parametrize("choices", [["ab", "ba"], [" ab", "ba"], ["  ab", " ba"], ["\nab", "\nba"]])
def test_answers_without_a_single_space_before_them_are_used_as_they_are(choices):
    task = _lm_eval.LocalTask("t", [Question("q", choices, 0, "t")])
    task.build_all_requests()
    assert [instance.args for instance in task.instances] == [("q", choice) for choice in choices]


def test_a_question_in_lm_evals_own_format_gives_lm_evals_own_numbers(model, tokenizer):
    """The same questions, once as a task of lm-eval is written, with templates, and once as ours."""
    raw = [
        {"question": f"what is {i * 7 % 5}", "options": ["red", "dark green", "ok"][: 2 + i % 2], "label": i % 2}
        for i in range(12)
    ]

    class Templated(ConfigurableTask):
        def download(self, *args, **kwargs):
            self.dataset = DatasetDict({"validation": Dataset.from_list(raw)})

    theirs = Templated(
        config={
            "task": "t",
            "dataset_path": "none",
            "validation_split": "validation",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "options",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        }
    )
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4, softmax_dtype="float32")
    stock = evaluator.evaluate(lm, {"t": theirs}, bootstrap_iters=10)
    ours = [asked(doc["question"], doc["options"], doc["label"], "t") for doc in raw]
    [result] = choices(model, tokenizer, ours)
    for metric in ("acc", "acc_norm"):
        assert list(result.metrics[metric].answers) == [s[metric] for s in stock["samples"]["t"]]
    assert result.metrics["acc"].answers != result.metrics["acc_norm"].answers, "lengths matter here"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question("q", ["a"], 0, "t"), "1 choices"),
        (Question("q", ["a", "b"], 2, "t"), "answer is number 2"),
        (Question("q", ["a", " "], 0, "t"), "empty choice"),
    ],
)
def test_damaged_questions_are_named(model, tokenizer, question, message):
    with pytest.raises(BadData, match=message):
        choices(model, tokenizer, [question])


def test_no_questions_is_bad_data(model, tokenizer):
    with pytest.raises(BadData, match="no questions"):
        choices(model, tokenizer, [])


def test_nan_is_a_numeric_fault(tokenizer):
    model = build("mixtral")
    model.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(NumericFault):
        choices(model, tokenizer, some(2))


def test_missing_lm_eval_is_named_with_the_way_out(model, tokenizer, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadConfig) as caught:
        choices(model, tokenizer, some(2))
    assert caught.value.hint == 'pip install "moekit[eval]"'


class Registry:
    """Stands for lm-eval's own registry, which takes seconds to read and whose data lie on the hub."""

    all_tasks = ("piqa", "arc_easy", "runs_code")

    def load(self, names):
        built = {name: _lm_eval.LocalTask(name, some(4, name)) for name in names}
        if "runs_code" in built:
            built["runs_code"].UNSAFE_CODE = True
        return {"tasks": built, "groups": {}}


def test_named_tasks_are_looked_up_in_the_registry_only(model, tokenizer, monkeypatch):
    monkeypatch.setattr(_lm_eval, "manager", Registry)
    assert [r.task for r in choices(model, tokenizer, some(2, "mine"), tasks=["piqa"])] == ["mine", "piqa"]
    with pytest.raises(BadConfig, match="'piqua'") as caught:
        choices(model, tokenizer, tasks=["piqua"])
    assert "piqa" in caught.value.hint
    with pytest.raises(BadConfig):
        choices(model, tokenizer, tasks=["/tmp/task.yaml"])
    with pytest.raises(UnsafeInput):
        choices(model, tokenizer, tasks=["runs_code"])
    with pytest.raises(BadConfig, match="two tasks"):
        choices(model, tokenizer, some(2, "piqa"), tasks=["piqa"])


@pytest.mark.slow
def test_the_real_registry_knows_the_usual_tasks():
    manager = _lm_eval.manager()
    assert {"piqa", "arc_easy", "boolq", "winogrande", "hellaswag", "blimp"} <= set(manager.all_tasks)


def test_nothing_is_drawn_and_progress_is_told(model, tokenizer, capfd):
    class Told:
        total = got = 0

        def start(self, label, total):
            self.total = total

        def advance(self, amount=1, note=""):
            self.got += amount

        def finish(self):
            pass

    told = Told()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    choices(model, tokenizer, some(5), progress=told)
    assert told.got == told.total == sum(len(q.choices) for q in some(5))
    out, err = capfd.readouterr()
    assert out == ""
    assert "it/s" not in err
    assert questions.__name__ in sys.modules
