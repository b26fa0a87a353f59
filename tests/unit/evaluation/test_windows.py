from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, strategies as st

from moekit.data.batches import TokenizedDocument, batches
from moekit.errors import BadConfig, BadData
from moekit.evaluation.windows import Window, by_length, from_batches, from_documents, slide


def pairs(window: Window) -> list[tuple[tuple[int, ...], int]]:
    """What is predicted, each with all that the model read before it."""
    return [(tuple(window.inputs[: p + 1]), t) for p, t in zip(window.positions, window.targets, strict=True)]


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_sliding_windows_score_every_token_but_the_first_once_and_always_with_context(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    scored = []
    for begin, end, first in slide(length, window, stride):
        assert 0 <= begin < end <= length
        assert end - begin <= window
        assert first >= 1
        if end > window:
            assert end - begin == window, "the last piece is full, too"
            assert first >= window - stride
        scored += range(begin + first, end)
    assert scored == list(range(1, length))


def test_a_document_shorter_than_the_window_is_one_window():
    corpus = from_documents([TokenizedDocument([7, 8, 9], "x", 0)], window=8)
    assert [pairs(w) for w in corpus.windows] == [[((7,), 8), ((7, 8), 9)]]


def test_each_document_has_a_digest_of_its_ids_however_it_is_read():
    docs = [TokenizedDocument(ids, "x", i) for i, ids in enumerate([[5, 6, 7], [5, 6, 7], [5, 6, 8], [9]])]
    digests = from_documents(docs, window=4).digests
    assert digests[0] == digests[1]
    assert len({*digests}) == 3
    assert from_documents(docs, window=2).digests == digests
    # Rows of four cut the second document, and it is put together again.
    assert from_batches(batches(docs[:3], batch_size=2, seq_len=4, pad_id=99)).digests == digests[:3]


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 8), (8, 0)])
def test_windows_without_context_are_refused(window, stride):
    with pytest.raises(BadConfig, match="without any context"):
        from_documents([TokenizedDocument([1, 2], "x", 0)], window=window, stride=stride)


def test_documents_of_one_token_make_no_window_but_keep_their_place():
    docs = [TokenizedDocument(ids, "x", i) for i, ids in enumerate([[5], [1, 2], []])]
    corpus = from_documents(docs, window=4)
    assert corpus.domains == ("x", "x", "x")
    assert [w.document for w in corpus.windows] == [1]


@pytest.mark.parametrize("docs", [[], [TokenizedDocument([5], "x", 0)]])
def test_text_without_anything_to_predict_is_bad_data(docs):
    with pytest.raises(BadData):
        from_documents(docs, window=4)


def test_packed_rows_are_taken_apart_at_document_boundaries():
    docs = [TokenizedDocument([10 * d + i for i in range(5)], "ab"[d % 2], d) for d in range(4)]
    corpus = from_batches(batches(docs, batch_size=2, seq_len=7, pad_id=99))
    for window in corpus.windows:
        read = [*window.inputs, window.targets[-1]]
        assert len({token // 10 for token in read}) == 1, "a window reads one document only"
        assert 99 not in read
        assert corpus.domains[window.document] == "ab"[read[0] // 10 % 2]


@dataclass(frozen=True)
class Rows:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    document_BS: torch.Tensor
    domain_BS: torch.Tensor
    domains: tuple[str, ...]


def test_padding_on_the_left_and_masked_tokens_are_left_out():
    rows = Rows(
        input_ids=torch.tensor([[0, 0, 1, 2, 3], [4, 5, 0, 0, 0]]),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]),
        document_BS=torch.tensor([[-1, -1, 0, 0, 0], [1, 1, 1, -1, -1]]),  # the mask, not the number, has the last word
        domain_BS=torch.tensor([[-1, -1, 0, 0, 0], [1, 1, 1, -1, -1]]),
        domains=("x", "y"),
    )
    corpus = from_batches([rows])
    assert [pairs(w) for w in corpus.windows] == [[((1,), 2), ((1, 2), 3)], [((4,), 5)]]
    assert corpus.domains == ("x", "y")
    assert from_batches([rows], ["p", "q"]).domains == ("p", "q")
    with pytest.raises(BadData, match="1 domains are named"):
        from_batches([rows], ["p"])


@given(st.lists(st.integers(2, 30), min_size=1, max_size=30), st.integers(1, 80))
def test_groups_hold_every_window_once_and_stay_within_the_budget(lengths, budget):
    windows = [Window.of(list(range(n)), 1, i) for i, n in enumerate(lengths)]
    groups = list(by_length(windows, budget))
    assert sorted(w.document for g in groups for w in g) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(len(w.inputs) for w in group) <= budget
