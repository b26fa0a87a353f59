"""A tiny model comes out balanced, tells domains apart, repeats, resumes and opens in stock transformers."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

import moekit
from moekit.data import Document, train_tokenizer
from moekit.errors import BadConfig, BadData
from moekit.training import TinyConfig, TrainConfig, build_tiny_model, train_tiny
from moekit.training.pretrain_tiny import split_documents
from tests.processes import python

WORDS = {
    "birds": ["heron", "swift", "wren", "robin", "finch", "sparrow", "plover", "dunlin", "curlew", "snipe"],
    "metals": ["iron", "zinc", "copper", "nickel", "cobalt", "silver", "tin", "lead", "gold", "platinum"],
    "verbs": ["walked", "jumped", "turned", "opened", "closed", "lifted", "dropped", "carried", "pushed", "pulled"],
}


def documents(count: int = 12, words: int = 160) -> list[Document]:
    """Three small languages: each its own words, in short repeating phrases."""
    draw = random.Random(0)
    made = []
    for domain, vocabulary in WORDS.items():
        phrases = [" ".join(draw.sample(vocabulary, 3)) for _ in range(6)]
        for number in range(count):
            text = ". ".join(draw.choice(phrases) for _ in range(words // 3))
            made.append(Document(text, domain, f"{domain}/{number}"))
    return made


WEIGHTS = {"balance": 0.02, "z": 1e-3}


def small(**changes: object) -> TinyConfig:
    training = TrainConfig(
        steps=60, lr=5e-3, seq_len=32, batch=8, objectives={"balance": 0.02, "z": 1e-3}, save_every=20
    )
    base = {
        "vocabulary": 300,
        "hidden": 32,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "experts": 8,
        "top_k": 2,
        "width": 16,
        "context": 64,
        "training": training,
    }
    return TinyConfig(**base | changes)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> moekit.training.TinyResult:
    torch.set_num_threads(1)
    return train_tiny(small(), documents(), tmp_path_factory.mktemp("tiny") / "model")


def test_it_learns_balances_and_tells_domains_apart(tiny: moekit.training.TinyResult) -> None:
    figures = tiny.figures()
    assert tiny.training.losses[0] == pytest.approx(torch.log(torch.tensor(300.0)).item(), rel=0.05)
    assert figures["heldout_loss"] < 0.5 * tiny.training.losses[0]
    assert figures["never_routed"] == 0
    assert figures["load_cv"] < 0.6
    assert figures["domain_nmi"] > 5 * figures["domain_nmi_shuffled"]
    assert figures["domain_nmi"] > 0.05
    assert [layer.domains.p_value < 0.05 for layer in tiny.routing.layers] == [True, True]


def test_it_opens_in_stock_transformers_and_checks(tiny: moekit.training.TinyResult) -> None:
    stock = AutoModelForCausalLM.from_pretrained(tiny.folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    text = "heron wren. iron zinc 42 Ü\n\tß"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = torch.tensor([tokenizer("heron swift wren")["input_ids"]])
    torch.testing.assert_close(stock(ids).logits, moekit.load(tiny.folder)(ids).logits)
    from moekit.checking import check

    check(tiny.folder).raise_if_bad()
    assert moekit.checkpoint.Record.read(Path(tiny.folder)).scores["domain_nmi"] == tiny.figures()["domain_nmi"]


@pytest.mark.full
@pytest.mark.slow
def test_it_repeats_bit_for_bit(tiny: moekit.training.TinyResult, tmp_path: Path) -> None:
    again = train_tiny(small(), documents(), tmp_path / "model")
    assert again.training.losses == tiny.training.losses
    assert again.figures() == tiny.figures()
    with pytest.raises(BadConfig, match="exists"):
        train_tiny(small(), documents(), tmp_path / "model")


def test_olmoe_layout(tmp_path: Path) -> None:
    config = small(layout="olmoe", training=TrainConfig(steps=2, seq_len=32, batch=2, save_every=None))
    result = train_tiny(config, documents(), tmp_path / "model")
    assert moekit.load(result.folder).config.model_type == "olmoe"
    assert result.routing.layers[0].experts == 8


KILL = """
import os, signal, sys
from pathlib import Path
import torch
from moekit.training import train_tiny
from tests.processes import python
from tests.unit.training.test_pretrain_tiny import documents, small

torch.set_num_threads(1)

class Bar:
    done = 0
    def start(self, label, total): self.label = label
    def finish(self): pass
    def advance(self, amount=1, note=""):
        if self.label == "training":
            self.done += amount
            if self.done == 33: os.kill(os.getpid(), signal.SIGKILL)

train_tiny(small(), documents(), Path(sys.argv[1]), Bar())
"""


@pytest.mark.full
@pytest.mark.slow
def test_a_killed_run_continues(tiny: moekit.training.TinyResult, tmp_path: Path) -> None:
    killed = python(["-c", KILL, tmp_path / "model"])
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "model").exists()
    result = train_tiny(small(), documents(), tmp_path / "model")
    assert result.training.resumed_from == 20
    assert result.training.losses == tiny.training.losses


def test_split_keeps_held_out_text_out() -> None:
    docs = documents()
    train_side, held = split_documents(docs, "train"), split_documents(docs, "heldout")
    assert {d.domain for d in held} == set(WORDS)
    assert not {d.text for d in train_side} & {d.text for d in held}
    assert len(train_side) + len(held) == len(docs)


def test_tokenizer_serves_small_domains_too() -> None:
    rare = Document("quetzalcoatlus " * 400, "rare", "r")
    common = Document(" ".join(WORDS["metals"]) * 4000, "common", "c")
    tokenizer = train_tokenizer([common, rare], 290, limit_bytes=12_000)
    assert len(tokenizer) == 290
    assert len(tokenizer("quetzalcoatlus")["input_ids"]) <= 6
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    with pytest.raises(BadData, match="only"):
        train_tokenizer([rare], 2000)
    with pytest.raises(BadData):
        train_tokenizer([], 300)


@pytest.mark.parametrize(
    "changes", [{"top_k": 9}, {"hidden": 30}, {"kv_heads": 3, "heads": 4}, {"context": 16}, {"vocabulary": 100}]
)
def test_impossible_sizes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        small(**changes)


def test_default_size() -> None:
    config = TinyConfig()
    with torch.device("meta"):
        model = build_tiny_model(config, "meta")
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 30e6
    assert 16 <= config.experts <= 32
    assert 2 <= config.top_k <= 4
    assert 4096 <= config.vocabulary <= 8192
