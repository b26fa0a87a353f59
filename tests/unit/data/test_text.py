"""Text comes back whole, in order, by domain; splits never overlap; broken files are named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from moekit.data import Document, load_text
from moekit.data.split import excerpts, sample, split_texts, truncate_bytes
from moekit.errors import BadConfig, BadData, UnsafeInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    (root / "code").mkdir(parents=True)
    (root / "prose.txt").write_text("\n".join(f"Sentence number {i} of the prose." for i in range(400)))
    for i in range(20):
        (root / "code" / f"{i:02d}.txt").write_text(f"def f{i}():\n    return {i}\n" * 40)
    (root / "table.csv").write_text("not read")
    (root / "code" / "empty.txt").write_text("")
    (root / ".hidden.txt").write_text("not read")
    return root


def test_folder_makes_a_domain_of_each_file_and_sub_folder(folder: Path) -> None:
    documents = load_text(str(folder))
    assert [d.domain for d in documents] == ["code"] * 20 + ["prose"]
    assert documents[3].text == (folder / "code" / "03.txt").read_text()
    assert documents[3].source == str(folder / "code" / "03.txt")


def test_what_a_folder_does_not_give_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "notes.md").write_text("# read")
    assert [d.domain for d in load_text(str(folder))] == ["code"] * 20 + ["notes", "prose"]
    assert "not read, as they are empty or none of" in caplog.text
    assert "code/empty.txt, table.csv" in caplog.text
    assert ".hidden" not in caplog.text


CHAT = [("user", "What is 2 + 2?"), ("assistant", "4")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": role, "content": content} for role, content in CHAT]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": CHAT[0][1]}]},
                {"role": "assistant", "content": "4"},
            ]
        },
        {"conversations": [{"from": "human", "value": CHAT[0][1]}, {"from": "gpt", "value": "4"}]},
        {"prompt": CHAT[0][1], "completion": "4"},
        {"instruction": CHAT[0][1], "input": "", "output": "4"},
    ],
)
def test_conversations_are_read_turn_by_turn(tmp_path: Path, record: dict[str, object]) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(record))
    assert load_text(str(path)) == [Document("What is 2 + 2?\n\n4", "chat", f"{path}:1", tuple(CHAT))]


@pytest.mark.parametrize("content", ['{"text": "a b"}\n{"text": "c"}\n', '[{"text": "a b"}, {"text": "c"}]'])
def test_json_files_hold_a_list_or_a_record_a_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "texts.json"
    path.write_text(content)
    assert [d.text for d in load_text(str(path))] == ["a b", "c"]
    path.write_text('{"text": "alone"}')
    assert [d.text for d in load_text(str(path))] == ["alone"]


def test_many_documents_hold_out_every_tenth(folder: Path) -> None:
    train = [d for d in load_text(str(folder), split="train") if d.domain == "code"]
    held = [d for d in load_text(str(folder), split="heldout") if d.domain == "code"]
    assert [Path(d.source).stem for d in held] == ["09", "19"]
    assert len(train) == 18
    assert not {d.source for d in train} & {d.source for d in held}


def test_a_single_document_is_cut_at_nine_tenths(folder: Path) -> None:
    whole = (folder / "prose.txt").read_text()
    train, held = (load_text(str(folder / "prose.txt"), split=split)[0].text for split in ("train", "heldout"))
    assert train + held == whole
    assert 0.85 < len(train) / len(whole) <= 0.9
    assert train.endswith("\n")


def test_jsonl_takes_domains_from_its_records(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    records = [{"text": "eins", "domain": "de"}, {"text": "one"}, {"text": "line\u2028separator"}]
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    assert load_text(str(path)) == [
        Document("eins", "de", f"{path}:1"),
        Document("one", "mixed", f"{path}:3"),
        Document("line\u2028separator", "mixed", f"{path}:5"),
    ]


def test_limit_is_shared_by_the_domains_and_repeats_with_its_seed(folder: Path) -> None:
    first, again = (load_text(str(folder), limit_bytes=6000, seed=3) for _ in range(2))
    assert first == again
    assert first != load_text(str(folder), limit_bytes=6000, seed=4)
    for domain in ("code", "prose"):
        size = sum(len(d.text.encode()) for d in first if d.domain == domain)
        assert 2000 < size <= 3000


def test_standard_library_needs_no_download(cache: Path) -> None:
    documents = load_text("stdlib", limit_bytes=50_000)
    assert {d.domain for d in documents} == {"python-code"}
    assert all(d.source.startswith("stdlib:") and d.source.endswith(".py") for d in documents)
    record = json.loads((cache / "sources" / "stdlib" / "source.json").read_text())
    assert record["documents"] > 300
    assert len(record["text_sha256"]) == 64
    assert record["licence"] == "PSF-2.0"


@pytest.mark.skipif(not Path("/usr/share/common-licenses").is_dir(), reason="not a Debian system")
def test_licences_are_a_source() -> None:
    assert any("GNU GENERAL PUBLIC LICENSE" in d.text for d in load_text("licences"))


def test_parts_are_joined_by_plus(folder: Path) -> None:
    documents = load_text(f"{folder / 'prose.txt'} + {folder}", limit_bytes=9000)
    assert {d.domain for d in documents} == {"prose", "code"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"txt": "b"}', "record 2 holds no text, but 'txt'"),
        (b'{"text": 3}', "record 1 holds no text"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"text": "a"}\nnope', "line 2 is not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_broken_jsonl_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadData, match=message) as caught:
        load_text(str(path))
    assert caught.value.file == str(path)
    assert caught.value.exit_code == 2


def test_empty_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(" \n\t\n")
    with pytest.raises(BadData, match="holds no text"):
        load_text(str(path))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BadData, match=r"holds no .* file with text"):
        load_text(str(tmp_path / "nothing"))


@pytest.mark.parametrize("spec", ["/no/such/place", "missing.txt", "./missing"])
def test_a_missing_path_is_named(spec: str) -> None:
    with pytest.raises(BadData, match="no such file or folder"):
        load_text(spec)
    with pytest.raises(BadData, match="no text is named"):
        load_text(f"stdlib+{spec[:0]}")


def test_impossible_values_are_refused(folder: Path) -> None:
    with pytest.raises(BadConfig, match="no split is called"):
        load_text(str(folder), split="test")  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="limit_bytes is 0"):
        load_text(str(folder), limit_bytes=0)
    with pytest.raises(BadData, match="is no text"):
        load_text("smollm2")


@given(st.lists(st.text(max_size=300), max_size=25))
def test_splits_are_disjoint_and_complete(texts: list[str]) -> None:
    train, held = split_texts(texts, "train"), split_texts(texts, "heldout")
    for i, text in enumerate(texts):
        parts = [part for j, part in train + held if j == i]
        assert "".join(parts).strip() == text.strip()
        if len(texts) >= 10:
            assert parts == [text]


@given(st.text(alphabet=st.sampled_from("ab \n漢"), max_size=500), st.integers(1, 60))
def test_excerpts_are_the_whole_text(text: str, size: int) -> None:
    pieces = excerpts(text, size)
    assert "".join(pieces) == text
    assert all(len(piece) <= 2 * size for piece in pieces)


@given(st.text(max_size=200), st.integers(1, 100))
def test_truncation_keeps_a_beginning_within_the_limit(text: str, limit: int) -> None:
    head = truncate_bytes(text, limit)
    assert text.startswith(head)
    assert len(head.encode()) <= max(limit, 0)


def test_sample_is_within_the_limit_and_leaves_no_crumbs() -> None:
    texts = [(i, "word " * 100) for i in range(50)]
    chosen = sample(texts, 1700, seed=0)
    sizes = [len(text) for _, text in chosen]
    assert sum(sizes) <= 1700
    assert sizes[:3] == [500, 500, 500]
    assert min(sizes) >= 200


@pytest.mark.parametrize("line", [{"text": "half \ud800"}, {"text": "a", "domain": "\udc00"}])
def test_half_characters_are_named(tmp_path: Path, line: dict[str, str]) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + json.dumps(line))
    with pytest.raises(BadData, match="record 2 holds half a character"):
        load_text(str(tmp_path / "x.jsonl"))


def test_names_that_are_no_utf8_make_domains_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    (tmp_path / os.fsdecode(b"caf\xe9") / "a.txt").write_text("some text")
    (document,) = load_text(str(tmp_path))
    assert document.domain == "caf\\udce9"
    document.source.encode()


def test_a_pipe_is_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UnsafeInput, match="no regular file"):
        load_text(str(tmp_path / "a.txt"))
