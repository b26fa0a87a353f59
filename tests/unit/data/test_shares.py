"""Shares of a text, counted by hand: a character is a token."""

from __future__ import annotations

from typing import Any

import pytest

from moekit.data.shares import take_shares
from moekit.data.text import Document
from moekit.errors import BadData


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) for character in text]}


def taken(sizes: dict[str, list[int]], most: int | None) -> dict[str, list[int]]:
    """Domain -> tokens read of each of its documents that was read."""
    documents = [Document("x" * size, domain, "") for domain, all_ in sizes.items() for size in all_]
    found = take_shares(documents, tokenizer, most)  # type: ignore[arg-type]
    assert [document.index for document in found] == sorted(document.index for document in found)
    return {domain: [len(d.ids) for d in found if d.domain == domain] for domain in sizes}


def test_one_long_document_gets_the_share_of_its_domain() -> None:
    # 8,192 for two domains: a half each, however many documents there are.
    found = taken({"book": [25_600], "lines": [40] * 2000}, 8192)
    assert found["book"] == [4096]
    assert sum(found["lines"]) == 4096
    assert found["lines"].count(40) == 102  # whole ones, and 16 tokens of the last


def test_what_a_domain_does_not_have_the_others_give() -> None:
    assert taken({"small": [100], "large": [5000]}, 1000) == {"small": [100], "large": [900]}
    assert taken({"large": [5000], "small": [100], "middle": [400]}, 1500) == {
        "large": [1000], "small": [100], "middle": [400],
    }  # fmt: skip


def test_what_a_document_does_not_have_the_others_give() -> None:
    # Of 1,024: 10 and 20 whole; the 994 that are left fall to two.
    assert taken({"a": [4000, 10, 20, 4000]}, 1024) == {"a": [497, 10, 20, 497]}


def test_many_documents_give_some_at_a_useful_length() -> None:
    found = taken({"a": [1000] * 100}, 1024)
    assert found == {"a": [256] * 4}
    documents = [Document("x" * 1000, "a", "") for _ in range(100)]
    assert [d.index for d in take_shares(documents, tokenizer, 1024)] == [0, 33, 66, 99]  # type: ignore[arg-type]


def test_all_of_it() -> None:
    assert taken({"a": [3, 0, 5]}, None) == {"a": [3, 5]}
    assert taken({"a": [3, 0, 5], "b": [2]}, 1000) == {"a": [3, 5], "b": [2]}
    with pytest.raises(BadData, match="fewer than two tokens"):
        taken({"a": [1]}, 10)
