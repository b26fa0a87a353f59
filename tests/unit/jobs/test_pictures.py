"""Pruning and profiling a vision MoE on pictures and text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import moekit
from moekit.data import load_text
from moekit.data.batches import pack
from moekit.data.pictures import PictureReader
from moekit.errors import BadConfig, BadData
from moekit.family import family, write
from moekit.jobs.trials.cell import attempt
from moekit.trace import Trace
from tests.pictures import conversation, processor, write_conversations, write_vision_model
from tests.tiny import write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_vision_model(folder / "aria")
    write_text(folder / "text")
    write_conversations(folder / "chat" / "chat.jsonl", 20)
    return folder


def by_hand(model: Path, chat: Path) -> dict[int, torch.Tensor]:
    """Layer -> [E] choices of the whole model on each conversation, one forward each, seen by hooks."""
    loaded = transformers.AriaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    reader = PictureReader(processor(), "here")
    counts = {layer: torch.zeros(8, dtype=torch.int64) for layer in range(2)}

    def see(layer: int) -> object:
        def hook(_: object, __: object, answer: tuple[torch.Tensor, ...]) -> None:
            counts[layer] += torch.bincount(answer[2].flatten(), minlength=8)

        return hook

    for layer in range(2):
        loaded.model.language_model.layers[layer].mlp.router.register_forward_hook(see(layer))
    with torch.no_grad():
        for document in load_text(str(chat)):
            loaded(**reader.prepare(document))
    return counts


@pytest.mark.full
@pytest.mark.slow
def test_profile_sees_what_the_model_sees_of_pictures(made: Path, tmp_path: Path) -> None:
    chat = made / "chat" / "chat.jsonl"
    moekit.profile(made / "aria", data=str(chat), max_tokens=None, seq_len=128, out=tmp_path / "trace")
    load = {layer: s["load"].long() for layer, s in Trace.load(tmp_path / "trace").require(("load",)).items()}
    expected = by_hand(made / "aria", chat)
    assert {layer: counts.reshape(-1, 8).sum(0).tolist() for layer, counts in load.items()} == {
        layer: counts.tolist() for layer, counts in expected.items()
    }


def test_pictures_choose_other_experts_than_text_alone(made: Path, tmp_path: Path) -> None:
    kept = {}
    for name, data in (("text", f"{made / 'text'}"), ("both", f"{made / 'text'}+{made / 'chat'}")):
        result = moekit.prune(
            made / "aria",
            method="frequency",
            keep=4,
            data=data,
            heldout=str(made / "text"),
            max_tokens=1200,
            seq_len=128,
            out=tmp_path / name,
        )
        assert result.check is not None
        assert result.check["ok"]
        kept[name] = [layer["kept"] for layer in result.layers]
    assert kept["text"] != kept["both"]
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    assert config["architectures"] == ["AriaForConditionalGeneration"]
    assert config["text_config"]["moe_num_experts"] == 4
    smaller = transformers.AriaForConditionalGeneration.from_pretrained(tmp_path / "both", dtype=torch.float32).eval()
    (document,) = load_text(str(_one(tmp_path, made)))
    with torch.no_grad():
        assert torch.isfinite(smaller(**PictureReader(processor(), "here").prepare(document)).logits).all()


def _one(folder: Path, made: Path) -> Path:
    picture = next((made / "chat").glob("china-*.png"))
    file = folder / "one.jsonl"
    file.write_text(json.dumps(conversation(picture, "where is it?", "by the water")) + "\n")
    return file


@pytest.mark.full
@pytest.mark.slow
def test_streamed_calibration_counts_what_the_whole_model_counts(made: Path, tmp_path: Path) -> None:
    chat = made / "chat" / "chat.jsonl"
    result = moekit.prune(
        made / "aria",
        method="frequency",
        keep=4,
        data=str(chat),
        max_tokens=None,
        seq_len=128,
        proof=False,
        heldout=str(made / "text"),
        plan=str(tmp_path / "plan.json"),
    )
    expected = by_hand(made / "aria", chat)
    for layer in result.layers:
        most = expected[layer["layer"]].float()
        least_kept = min(most[layer["kept"]])
        dropped = [e for e in range(8) if e not in layer["kept"]]
        assert least_kept >= max(most[dropped])
    rows = pack(load_text(str(chat)), processor().tokenizer, 128, pictures=PictureReader(processor(), "here"))
    assert result.tokens == rows.tokens


def test_a_folder_without_its_processor_is_refused_before_any_work(made: Path, tmp_path: Path) -> None:
    from shutil import copytree

    copytree(made / "aria", tmp_path / "bare")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    with pytest.raises(BadConfig, match="processor") as caught:
        moekit.prune(
            tmp_path / "bare", method="frequency", keep=4, data=str(made / "chat"), proof=False, out=tmp_path / "out"
        )
    assert "conversations show pictures" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_takes_no_pictures_reads_the_words(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path / "moe", "olmoe")
    moekit.profile(tmp_path / "moe", data=str(made / "chat"), out=tmp_path / "trace")
    assert "their words alone are read" in caplog.text


def test_pictures_that_have_experts_of_their_own_are_refused_before_any_work(made: Path, tmp_path: Path) -> None:
    folder = write(family("ernie4_5_vl_moe"), tmp_path / "ernie")
    processor().save_pretrained(folder)

    def run() -> None:
        with pytest.raises(BadData, match=r"experts of their own \(.*vision_moe\)") as caught:
            moekit.profile(folder, data=str(made / "chat"), max_tokens=None, seq_len=128, out=tmp_path / "trace")
        raise caught.value

    assert attempt(run)[0].when == "before work"
