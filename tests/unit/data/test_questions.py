"""Every format is told by its content and gives the prompts that lm-evaluation-harness would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moekit.data import Document, Question, load_questions
from moekit.data.continuations import continuation_questions
from moekit.data.sources import Piece, as_json
from moekit.errors import BadConfig, BadData
from moekit_demo.base import PackagedText


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_piqa(tmp_path: Path) -> None:
    record = {
        "instruction": "Please choose the correct solution to the question: How do I dry wood?\n\n"
        "Solution1: In the sun.\n\nSolution2: In water: slowly.\n\nAnswer format: solution1/solution2",
        "input": "",
        "output": "the correct answer is solution1",
        "answer": "solution1",
    }
    path = write(tmp_path, "piqa/test.json", [record])
    assert load_questions(str(path)) == [
        Question("Question: How do I dry wood?\nAnswer:", (" In the sun.", " In water: slowly."), 0, "piqa")
    ]


def test_arc_with_choices_on_one_line(tmp_path: Path) -> None:
    record = {
        "instruction": "Please choose the correct answer to the question: Which is red?\n\nAnswer1: Blood. "
        "Answer2: Grass. Answer3: Snow.\n\nAnswer format: answer1/answer2/answer3",
        "answer": "answer3",
    }
    (question,) = load_questions(str(write(tmp_path, "arc_easy/test.json", [record])))
    assert question == Question("Question: Which is red?\nAnswer:", (" Blood.", " Grass.", " Snow."), 2, "arc_easy")


def test_boolq(tmp_path: Path) -> None:
    text = "Please answer the following question with true or false, question: {}?\n\nAnswer format: true/false"
    records = [{"instruction": text.format(q), "answer": a} for q, a in (("is ice hot", "false"), ("is it", "true"))]
    first, second = load_questions(str(write(tmp_path, "boolq/test.json", records)))
    assert first == Question("Question: is ice hot?\nAnswer:", (" no", " yes"), 0, "boolq")
    assert second.answer == 1


def test_winogrande_puts_the_options_into_the_gap(tmp_path: Path) -> None:
    record = {
        "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: Ann "
        "thanked Eve because _ had helped.\n\nOption1: Ann Option2: Eve Answer format: option1/option2",
        "answer": "option2",
    }
    (question,) = load_questions(str(write(tmp_path, "winogrande/test.json", [record])))
    assert question.context + question.choices[question.answer] == "Ann thanked Eve because Eve had helped."
    assert question.choices == (" Ann had helped.", " Eve had helped.")


@pytest.mark.parametrize("header", ["question,choice0,choice1,choice2,choice3,answer\n", ""])
@pytest.mark.parametrize("answer", ["2", "C"])
def test_mmlu(tmp_path: Path, header: str, answer: str) -> None:
    path = write(tmp_path, "anatomy_test.csv", f'{header}"Which, then?",a,b,"c, too",d,{answer}\n')
    assert load_questions(str(path)) == [
        Question("Which, then?\nA. a\nB. b\nC. c, too\nD. d\nAnswer:", (" A", " B", " C", " D"), 2, "mmlu-anatomy")
    ]


def test_blimp_compares_whole_sentences(tmp_path: Path) -> None:
    record = {"sentence_good": "She runs.", "sentence_bad": "She run.", "UID": "agreement"}
    path = write(tmp_path, "x.jsonl", json.dumps(record) + "\n")
    assert load_questions(str(path)) == [Question("", ("She runs.", "She run."), 0, "blimp-agreement")]


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["red", "blue"], 1),
        (["red", "blue"], "blue"),
        (["red", "blue"], "B"),
        (["red", "blue"], "1"),
        ({"A": "red", "B": "blue"}, "B"),
        ({"text": ["red", "blue"], "label": ["1", "2"]}, "2"),
    ],
)
def test_generic_records(tmp_path: Path, choices: object, answer: object) -> None:
    path = write(tmp_path, "sky.jsonl", json.dumps({"question": "Sky?", "choices": choices, "answer": answer}))
    assert load_questions(str(path)) == [Question("Question: Sky?\nAnswer:", (" red", " blue"), 1, "sky")]


def test_a_context_is_used_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, "raw.jsonl", as_json("The sky is", [" blue", " red"], 0, "colours"))
    assert load_questions(str(path)) == [Question("The sky is", (" blue", " red"), 0, "colours")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{]", "is not JSON"),
        ("a.json", [{"foo": 1}], "record 1 is no multiple-choice question"),
        ("a.json", [7], "record 1 is no multiple-choice question"),
        ("a.json", [{"question": "q", "choices": ["a"], "answer": 0}], "record 1 .* 1 choices"),
        ("a.json", [{"question": "q", "choices": ["a", "b"], "answer": "z"}], "no index, label or choice"),
        ("a.json", [{"question": "q", "choices": ["a", "b"], "answer": 2}], "the answer 2"),
        ("a.json", [{"instruction": "no choices here", "answer": "option1"}], "record 1"),
        ("a.csv", "q,a,b,9\n", "row 1 has the answer '9'"),
        ("a.csv", "q,a\n", "row 1 has 2 columns"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(BadData, match=message) as caught:
        load_questions(str(path))
    assert caught.value.file == str(path)


def test_a_folder_gives_all_its_files_and_the_limit_counts_per_task(tmp_path: Path) -> None:
    for task in ("one", "two"):
        records = [{"question": f"{task} {i}", "choices": ["a", "b"], "answer": i % 2} for i in range(30)]
        write(tmp_path, f"all/{task}.jsonl", "\n".join(json.dumps(r) for r in records))
    assert len(load_questions(str(tmp_path / "all"))) == 60
    first, again, other = (load_questions(str(tmp_path / "all"), limit=5, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert [q.task for q in first] == ["one"] * 5 + ["two"] * 5


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no file, folder or source of questions") as caught:
        load_questions("nowhere")
    assert "analogies" in str(caught.value.hint)
    with pytest.raises(BadData, match=r"holds no \.json"):
        load_questions(str(tmp_path))
    with pytest.raises(BadData, match="holds no questions"):
        load_questions("stdlib")
    with pytest.raises(BadConfig, match="a limit of 0"):
        load_questions("continuations:stdlib", limit=0)


def test_questions_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [Piece("1", as_json("2 + 2 =", [" 4", " 5"], 0, "sums"))]
    source = PackagedText("sums", "sums", "none", lambda _: pieces, kind="questions")
    monkeypatch.setattr("moekit.data.questions.all_sources", lambda: {"sums": source})
    monkeypatch.setattr("moekit.data.questions.get_source", lambda name: source)
    assert load_questions("sums") == [Question("2 + 2 =", (" 4", " 5"), 0, "sums")]


def test_continuations_follow_their_context() -> None:
    texts = [" ".join(f"w{100 * n + i}" for i in range(900)) for n in range(6)]
    documents = [Document(text, "numbers", str(n)) for n, text in enumerate(texts)]
    questions = continuation_questions(documents, 20, seed=1)
    assert questions == continuation_questions(documents, 20, seed=1) != continuation_questions(documents, 20, seed=2)
    assert len(questions) == 20
    for question in questions:
        assert question.task == "continuation-numbers"
        follows = [any(question.context + choice in text for text in texts) for choice in question.choices]
        assert follows.index(True) == question.answer
        assert sum(follows) == 1
        assert all(choice.startswith(" ") and len(choice) >= 60 for choice in question.choices)
    assert len({q.answer for q in questions}) > 1


def test_continuations_of_the_held_out_standard_library() -> None:
    questions = load_questions("continuations:stdlib", limit=10)
    assert [q.task for q in questions] == ["continuation-python-code"] * 10


def test_too_little_text_for_questions() -> None:
    with pytest.raises(BadData, match="'tiny' has too little text for 5 questions"):
        continuation_questions([Document("a few words only", "tiny", "1")], 5, 0)
