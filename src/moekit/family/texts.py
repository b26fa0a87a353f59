"""A tokenizer and a text for tiny models: one token a character, and two domains that use different ones."""

from __future__ import annotations

import string
from typing import Any

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_SENTENCES = {
    "prose": "the river runs down to the sea and the old mill turns all day. ",
    "sums": "12 + 7 = 19; 3 * 4 = 12; 81 / 9 = 9; 5 - 2 = 3; ",
}


def tokenizer() -> Any:
    """One token a printable character, behind pad (0), bos (1), eos (2) and unknown (3)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set(string.printable) - set("\x0b\x0c\r"))
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL[3]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    pad, bos, eos, unknown = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unknown
    )


def texts(documents: int = 10, repeats: int = 4) -> dict[str, list[str]]:
    """Domain -> documents, each of which begins at another character.

    Args:
        documents: of each domain.
        repeats: of the domain's sentence in a document.
    """
    return {
        domain: [(sentence[number:] + sentence[:number]) * repeats for number in range(documents)]
        for domain, sentence in _SENTENCES.items()
    }
