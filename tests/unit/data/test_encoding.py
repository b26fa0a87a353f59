"""Every reader of text begins documents as the tokenizer does, or as it is told; by hand, on a tokenizer with <bos>."""

from __future__ import annotations

import pytest
import torch

from moekit.data import Document, pack, tokenize
from moekit.data.batches import arrange
from moekit.data.encoding import beginning, encode, encode_document
from moekit.data.passages import FEW, units
from moekit.data.shares import take_shares
from moekit.errors import BadConfig
from moekit.trace import Trace, record
from tests.families import build
from tests.tiny import BOS, bos_tokenizer, tokenizer


@pytest.fixture
def begins():
    return bos_tokenizer()


TEXTS = [Document("abc", "one", "a"), Document("de", "one", "b"), Document("fgh", "two", "c")]


def test_a_text_begins_as_the_tokenizer_begins_it_and_nothing_follows(begins) -> None:
    plain = begins("abc", add_special_tokens=False)["input_ids"]
    assert begins("abc")["input_ids"] == [BOS, *plain, BOS]
    assert encode("abc", begins) == encode("abc", begins, bos="always") == [BOS, *plain]
    assert encode("abc", begins, bos="never") == plain
    assert encode("", begins) == []
    assert beginning(begins) == [BOS]


def test_always_needs_a_beginning_token() -> None:
    plain = tokenizer()
    assert beginning(plain) == []
    plain.bos_token = None
    with pytest.raises(BadConfig, match="no beginning token"):
        encode("abc", plain, bos="always")


def test_all_readers_agree(begins) -> None:
    expected = [[BOS, *begins(d.text, add_special_tokens=False)["input_ids"]] for d in TEXTS]
    assert [d.ids for d in tokenize(TEXTS, begins)] == expected
    assert [d.ids for d in take_shares(TEXTS, begins, 100)] == expected
    assert [d.begins for d in take_shares(TEXTS, begins, 100)] == [1, 1, 1]
    rows = pack(TEXTS, begins, 8, pad=True)
    assert rows.begins == (BOS,)
    assert [row["input_ids"][0].item() for row in (rows[i] for i in range(3))] == [BOS] * 3
    assert pack(TEXTS, begins, 8, bos="never").begins == ()


def test_a_limit_counts_the_beginning(begins) -> None:
    assert [len(d.ids) for d in tokenize(TEXTS, begins, 2)] == [2, 2, 2]


def test_conversations_go_through_the_chat_template(begins) -> None:
    document = Document("hi\n\nyo", "chat", "x", (("user", "hi"), ("assistant", "yo")))
    assert encode_document(document, begins) == encode("hi\n\nyo", begins)
    begins.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    assert encode_document(document, begins) == begins("u:hi;a:yo;", add_special_tokens=False)["input_ids"]


def test_a_trace_says_what_documents_began_with(begins, tmp_path) -> None:
    model = build("olmoe")
    for bos, expected in (("auto", (BOS,)), ("never", ())):
        rows = arrange(tokenize(TEXTS, begins, bos=bos), 8)
        trace = record(model, rows.batches(2), tokenizer=begins)
        assert [entry.begins for entry in trace.meta.data] == [expected] * 2
        trace.save(tmp_path / bos)
        assert Trace.load(tmp_path / bos).meta.data == trace.meta.data
        assert torch.equal(trace.indices(0), Trace.load(tmp_path / bos).indices(0))


def test_few_documents_are_cut_into_passages_and_that_is_said(caplog) -> None:
    long = Document("word and more. " * 1000, "book", "b")
    pieces = units([long, *TEXTS])
    assert "".join(d.text for d in pieces if d.domain == "book") == long.text
    assert [d for d in pieces if d.domain != "book"] == TEXTS
    assert "book: 1 document cut into 7 passages" in caplog.text
    assert units([long] * FEW) == [long] * FEW
