"""Rows hold every token once, know their documents, never mix domains, and count no padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moekit.data import Document, TokenizedDocument, pack, tokenize, vocabulary
from moekit.data.batches import arrange, batches, pad_id_of
from moekit.errors import BadConfig, BadData


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[UNK]": 0, "[END]": 1, "a": 2, "b": 3, "c": 4, "d": 5}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="[END]")


DOCUMENTS = [Document("a b c", "x", "1"), Document("d d", "x", "2"), Document("c b a d c", "y", "3")]


def test_packed_rows_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = pack(DOCUMENTS, tokenizer, 4, end_token=True)
    # x: a b c END | d d END .   y: c b a d | c END . .
    assert rows.input_ids.tolist() == [[2, 3, 4, 1], [5, 5, 1, 1], [4, 3, 2, 5], [4, 1, 1, 1]]
    assert rows.document_RS.tolist() == [[0] * 4, [1, 1, 1, -1], [2] * 4, [2, 2, -1, -1]]
    assert rows.domain_RS.tolist() == [[0] * 4, [0, 0, 0, -1], [1] * 4, [1, 1, -1, -1]]
    assert rows.calibration.tolist() == [[2, 3, 4, 1], [5, 5, 1, -1], [4, 3, 2, 5], [4, 1, -1, -1]]
    assert rows.domains == ("x", "y")
    assert rows.tokens == 13
    assert rows.tokens_per_domain == {"x": 7, "y": 6}


def test_padded_rows_start_each_document_anew(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = pack(DOCUMENTS, tokenizer, 4, pad=True)
    assert rows.document_RS.tolist() == [[0, 0, 0, -1], [1, 1, -1, -1], [2, 2, 2, 2], [2, -1, -1, -1]]


def test_batch_masks_padding_and_drops_empty_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = pack(DOCUMENTS, tokenizer, 8, pad=True).batches(2)
    assert first.input_ids.shape == (2, 3)
    assert first.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first.labels.tolist() == [[2, 3, 4], [5, 5, -100]]
    assert first.input_ids.dtype == torch.int64
    assert first.document_BS.dtype == torch.int32
    assert (first.tokens, second.tokens) == (5, 5)


def test_rows_are_a_data_set_for_a_trainer(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = pack(DOCUMENTS, tokenizer, 4)
    item = rows[1]
    assert item["input_ids"].tolist()[0] == 5
    assert item["labels"].tolist() == [5, -100, -100, -100]
    assert len([rows[i] for i in range(len(rows))]) == len(rows) == 4
    with pytest.raises(IndexError):
        rows[4]


def test_shuffling_repeats_with_its_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = pack([Document("a b c d " * 40, "x", "1")], tokenizer, 4)
    order = [torch.cat([b.input_ids * 0 + b.document_BS for b in rows.batches(3, seed=s)]).shape for s in (1, 1)]
    assert order[0] == order[1] == (40, 4)
    numbered = arrange([TokenizedDocument(list(range(80)), "x", 0)], 4)
    first, again, other = ([b.input_ids.tolist() for b in numbered.batches(3, seed=s)] for s in (1, 1, 2))
    assert first == again != other
    assert sorted(row for rows in first for row in rows) == [b.tolist() for b in numbered.input_ids]


def test_documents_can_be_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenized = tokenize(DOCUMENTS, tokenizer, 2, end_token=True)
    assert [d.ids for d in tokenized] == [[2, 3], [5, 5], [4, 3]]
    assert [d.index for d in tokenized] == [0, 1, 2]


def test_padding_falls_back_to_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token_id is None
    assert pad_id_of(tokenizer) == 1


def test_text_without_anything_to_predict_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadData, match="fewer than two tokens"):
        tokenize([Document("a", "x", "1")], tokenizer)
    with pytest.raises(BadData, match="fewer than two tokens"):
        tokenize([], tokenizer)
    with pytest.raises(BadConfig, match="predict nothing"):
        pack(DOCUMENTS, tokenizer, 1)
    with pytest.raises(BadConfig, match="batch_size"):
        next(pack(DOCUMENTS, tokenizer, 4).batches(0))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary.check(tokenizer, 6)
    with pytest.raises(BadConfig, match="ids up to 5, but the model embeds 5"):
        vocabulary.check(tokenizer, 5)


LENGTHS = st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 23)), min_size=1, max_size=9)


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 9), st.integers(1, 4), st.booleans(), st.none() | st.integers(0, 3))
def test_every_token_is_in_exactly_one_place(
    lengths: list[tuple[str, int]], seq_len: int, batch_size: int, pad: bool, seed: int | None
) -> None:
    documents = [TokenizedDocument([100 * i + j for j in range(n)], d, i) for i, (d, n) in enumerate(sorted(lengths))]
    seen: dict[int, list[int]] = {}
    for batch in batches(documents, batch_size, seq_len, pad=pad, seed=seed):
        keep = batch.attention_mask.bool()
        assert torch.equal(keep, batch.document_BS >= 0)
        assert torch.equal(keep, batch.domain_BS >= 0)
        for row in range(len(keep)):
            assert len(set(batch.domain_BS[row][keep[row]].tolist())) == 1
            if pad:
                assert len(set(batch.document_BS[row][keep[row]].tolist())) == 1
        for token, number in zip(batch.input_ids[keep].tolist(), batch.document_BS[keep].tolist(), strict=True):
            seen.setdefault(number, []).append(token)
    assert {i: sorted(ids) for i, ids in seen.items()} == {d.index: d.ids for d in documents}
