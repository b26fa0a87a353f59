"""A tiny model folder with a tokenizer of its own, and text of two domains: what whole commands are tried on."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tests.families import VOCAB, build

# Id of the beginning token.
BOS = 1
SENTENCES = {
    "prose": "the river runs down to the sea and the old mill turns all day. ",
    "sums": "12 + 7 = 19; 3 * 4 = 12; 81 / 9 = 9; 5 - 2 = 3; ",
}


def tokenizer() -> Any:
    """One token a character, below the vocabulary of `tests.families`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    letters = sorted(set(string.printable) - set("\x0b\x0c\r"))
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    assert len(vocabulary) <= VOCAB
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def bos_tokenizer() -> Any:
    """The same, but that it puts a beginning token before every text (as many families do), and one behind it."""
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    name = made.bos_token
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{name} $A {name}", pair=f"{name} $A {name} $B", special_tokens=[(name, BOS)]
    )
    return made


def write_model(folder: Path, family: str = "olmoe", seed: int = 0, **overrides: Any) -> Path:
    """Write a random model with its tokenizer, as transformers does."""
    build(family, seed, **overrides).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_text(folder: Path, documents: int = 6, repeats: int = 4) -> Path:
    """Write a folder of text: a sub-folder for each domain, a file for each document."""
    for domain, sentence in SENTENCES.items():
        (folder / domain).mkdir(parents=True)
        for number in range(documents):
            shifted = sentence[number:] + sentence[:number]
            (folder / domain / f"{number}.txt").write_text(shifted * repeats)
    return folder
