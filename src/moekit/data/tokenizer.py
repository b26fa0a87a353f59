"""A byte-level BPE tokenizer of one's own, for models trained from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moekit.data.split import excerpts, sample
from moekit.data.text import Document
from moekit.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, END = "<|pad|>", "<|end|>"
# All bytes, so that any text can be written, and the two above.
SMALLEST = 256 + 2


def _even_sample(documents: Sequence[Document], limit_bytes: int, seed: int) -> Iterator[str]:
    """Excerpts of all domains, as many bytes of each: a large domain must not own the vocabulary."""
    domains = list(dict.fromkeys(d.domain for d in documents))
    for domain in domains:
        texts = [(d.source, d.text) for d in documents if d.domain == domain]
        if limit_bytes >= sum(len(d.text.encode()) for d in documents):
            pieces = [piece for _, text in texts for piece in excerpts(text)]
        else:
            pieces = [piece for _, piece in sample(texts, limit_bytes // len(domains), seed)]
        yield from pieces


def train_tokenizer(
    documents: Sequence[Document], size: int, *, limit_bytes: int = 12_000_000, seed: int = 0
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE.

    Args:
        documents: text of all domains.
        size: words of the vocabulary, padding and end of text among them.
        limit_bytes: bytes of text looked at, shared evenly among domains; more only takes longer.
        seed: of the excerpts.

    Returns:
        A fast tokenizer with `pad_token` and `eos_token`; it writes any text back exactly.

    Raises:
        BadData: there is no text, or too little for so many words.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not documents:
        raise BadData("there is no text to learn a vocabulary from")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_even_sample(documents, limit_bytes, seed), trainer)
    if tokenizer.get_vocab_size() < size:
        raise BadData(
            f"the text yields only {tokenizer.get_vocab_size()} of {size} words",
            hint="give more text, or ask for a smaller vocabulary",
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
