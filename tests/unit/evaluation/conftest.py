from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from tests.families import VOCAB

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


@pytest.fixture(scope="session")
def tokenizer():
    """One token per character, spaces included: what is context and what is answer can be seen by eye."""
    characters = [chr(i) for i in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters, "\n"])}
    assert len(vocabulary) <= VOCAB
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=None
    )
