"""Conversations with pictures: how records show them, and what the processor makes of them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.data import load_text
from moekit.data.batches import arrange, pack
from moekit.data.formats import Picture
from moekit.data.pictures import PictureReader, open_picture
from moekit.data.shares import take_shares
from moekit.errors import BadConfig, BadData
from tests.pictures import PHOTOS, TOKENS_A_PICTURE, conversation, processor, write_conversations

IMAGE_ID = 4


@pytest.fixture(scope="module")
def reader() -> PictureReader:
    return PictureReader(processor(), "here")


def write(file: Path, *records: Any) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
    ],
)
def test_a_part_of_a_message_shows_a_picture(part: dict[str, Any], tmp_path: Path) -> None:
    turn = {"role": "user", "content": [{"type": "text", "text": "look"}, part]}
    (document,) = load_text(write(tmp_path / "chat.jsonl", {"messages": [turn]}))
    assert document.pictures == (Picture(str(tmp_path / "a.png")),)
    assert document.text == "look"
    assert document.messages[0][1] == ("look", document.pictures[0])


def test_a_record_lists_pictures_beside_its_messages(tmp_path: Path) -> None:
    record = {
        "images": ["a.png", {"path": "b.png"}],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nwhich?"},
            {"from": "gpt", "value": "the first"},
        ],
    }
    (document,) = load_text(write(tmp_path / "chat.jsonl", record))
    assert [picture.source for picture in document.pictures] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert document.messages[0] == ("user", (*document.pictures, "which?"))
    assert document.text == "which?\n\nthe first"
    record["images"] = ["a.png"]
    with pytest.raises(BadData, match="lists 1 pictures, and its messages say <image> 2 times"):
        load_text(write(tmp_path / "chat.jsonl", record))


def test_text_alone_is_read_as_before(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (document,) = load_text(write(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": parts}]}))
    assert document.messages == (("user", "a\nb"),)
    assert document.pictures == ()


def test_a_picture_becomes_the_tokens_that_the_processor_gives_it(reader: PictureReader, tmp_path: Path) -> None:
    file = write(tmp_path / "chat.jsonl", conversation(PHOTOS / "china.jpg", "where?", "here"))
    (document,) = load_text(file)
    ids = reader.ids(document)
    assert ids.count(IMAGE_ID) == TOKENS_A_PICTURE
    rows = pack([document], processor().tokenizer, 64, pictures=reader)
    (batch,) = rows.batches(8)
    assert batch.input_ids[0].tolist() == ids
    assert batch.shown is not None
    features = batch.shown.features()
    assert features["pixel_values"].shape == (1, 3, 980, 980)
    assert float(features["pixel_values"].std()) > 0.1, "a photograph is not one colour"
    assert torch.equal(features["pixel_values"], batch.shown.features()["pixel_values"])


def test_rows_with_pictures_are_batches_of_their_own_and_never_cut(reader: PictureReader, tmp_path: Path) -> None:
    chat = write_conversations(tmp_path / "chat" / "chat.jsonl", 3)
    (tmp_path / "plain").mkdir()
    for number in range(3):
        (tmp_path / "plain" / f"{number}.txt").write_text("plain words " * 12)
    documents = load_text(f"{chat}+{tmp_path / 'plain'}")
    taken = take_shares(documents, processor().tokenizer, None, pictures=reader, longest=96)
    batches = list(arrange(taken, 96).batches(4))
    shown = [batch for batch in batches if batch.shown is not None]
    assert len(shown) == 3
    assert all(len(batch.input_ids) == 1 and (batch.input_ids == IMAGE_ID).sum() == TOKENS_A_PICTURE for batch in shown)
    text = [batch for batch in batches if batch.shown is None]
    assert sum(batch.tokens for batch in text) == 3 * 12 * 12
    assert len({batch.shown.digest for batch in shown if batch.shown is not None}) == 3
    with pytest.raises(BadConfig, match="is never cut: rows have 20") as caught:
        arrange(taken, 20)
    assert str(max(len(d.ids) for d in taken if d.shown)) in str(caught.value.hint)


def test_conversations_that_do_not_fit_are_left_out_and_told(
    reader: PictureReader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = conversation(PHOTOS / "china.jpg", "why " * 40, "so")
    short = conversation(PHOTOS / "flower.jpg", "what?", "a flower")
    documents = load_text(write(tmp_path / "chat.jsonl", long, short))
    taken = take_shares(documents, processor().tokenizer, 512, pictures=reader, longest=64)
    assert [document.index for document in taken] == [1]
    assert "1 conversations with pictures are left out" in caplog.text
    assert "--seq-len" in caplog.text


def test_without_a_reader_the_words_alone_are_read(tmp_path: Path) -> None:
    documents = load_text(write(tmp_path / "chat.jsonl", conversation(PHOTOS / "china.jpg", "where?", "here")))
    tokenizer = processor().tokenizer
    (taken,) = take_shares(documents, tokenizer, 512)
    assert taken.shown is None
    assert IMAGE_ID not in taken.ids
    assert tokenizer.decode(taken.ids).replace(" ", "").count("where?") == 1


def test_a_picture_within_its_address(tmp_path: Path) -> None:
    data = base64.b64encode((PHOTOS / "flower.jpg").read_bytes()).decode()
    assert open_picture(Picture(f"data:image/jpeg;base64,{data}"), "chat:1").size == (640, 427)
    with pytest.raises(BadData, match="damaged"):
        open_picture(Picture("data:image/jpeg;base64,%%%"), "chat:1")


def test_what_is_no_picture_is_told_with_the_line_that_names_it(reader: PictureReader, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("no picture at all")
    (tmp_path / "cut.jpg").write_bytes((PHOTOS / "china.jpg").read_bytes()[:2000])
    for name, words in (
        ("gone.png", "there is no such picture"),
        ("note.png", "no picture"),
        ("cut.jpg", "no picture"),
    ):
        (document,) = load_text(write(tmp_path / "chat.jsonl", conversation(name, "what?", "that")))
        with pytest.raises(BadData, match=words) as caught:
            reader.ids(document)
        assert "chat.jsonl:1" in str(caught.value)
        assert name in str(caught.value.file)
    with pytest.raises(BadData, match="not fetched from the network"):
        open_picture(Picture("https://example.org/a.png"), "chat:1")


def test_a_processor_without_a_template_is_refused() -> None:
    made = processor()
    made.chat_template = None
    with pytest.raises(BadConfig, match="no chat template"):
        PictureReader(made, "here")
