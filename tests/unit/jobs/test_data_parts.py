"""Held-out text is cut into passages and shared out between profiling and judging."""

from __future__ import annotations

import pytest

from moekit.data import Document
from moekit.errors import BadData
from moekit.jobs.data import passages, share_out


def test_passages_keep_all_text_in_order_and_respect_the_size() -> None:
    document = Document("".join(f"line {i} of some text\n" for i in range(100)), "d", "s")
    pieces = passages(document, 200)
    joined = "".join(piece.text for piece in pieces)
    assert document.text.startswith(joined)
    assert len(document.text) - len(joined) < 100, "only a short rest may be left out"
    assert all(100 <= len(piece.text) <= 200 for piece in pieces)
    assert [piece.source for piece in pieces] == [f"s#{i}" for i in range(len(pieces))]
    assert {piece.domain for piece in pieces} == {"d"}


def test_a_long_line_is_cut_and_a_short_document_stays() -> None:
    assert [len(p.text) for p in passages(Document("x" * 1000, "d", "s"), 300)] == [300, 300, 300]
    assert [p.text for p in passages(Document("short", "d", "s"), 300)] == ["short"]


def test_both_sides_get_every_domain_and_nothing_twice() -> None:
    documents = [Document(f"{domain}{i:03d}" * 20, domain, "s") for domain in "ab" for i in range(10)]
    profile, heldout = share_out(documents, sum(len(d.text) for d in documents) // 4)
    assert {d.domain for d in profile} == {d.domain for d in heldout} == {"a", "b"}
    assert sorted(d.text for d in [*profile, *heldout]) == sorted(d.text for d in documents)
    assert len(profile) in range(4, 8)


def test_two_documents_go_one_to_each_side_and_one_is_refused() -> None:
    two = [Document("one", "a", "s"), Document("two", "a", "s")]
    assert share_out(two, 10_000) == ([two[0]], [two[1]])
    with pytest.raises(BadData, match="single held-out document"):
        share_out(two[:1], 3)
