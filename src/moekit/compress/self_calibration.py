"""Calibration text as a task is served: prompts, each followed by the model's own answer.

Calibrating on prompt and own answer keeps a domain's quality better than on the prompt, the answer or foreign text
alone (arXiv:2504.06792).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from moekit._progress import Progress
from moekit.data import vocabulary
from moekit.data.batches import TokenizedDocument
from moekit.data.text import Document
from moekit.errors import BadConfig, BadData
from moekit.trace.generation import record_generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Demonstrations of a domain that the paper calibrates on.
DEMONSTRATIONS = 25

T = TypeVar("T", Document, TokenizedDocument)


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as the model is asked it: in its chat template where the tokenizer has one."""
    if not _chats(tokenizer):
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of `prompt_text`.

    Raises:
        BadData: the prompt has no tokens.
    """
    # A template writes the special tokens itself.
    found = tokenizer(prompt_text(tokenizer, prompt), add_special_tokens=not _chats(tokenizer))["input_ids"]
    if not found:
        raise BadData("the prompt has no tokens", hint="leave empty prompts out")
    return [int(i) for i in found]


def answer_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[TokenizedDocument]:
    """Let the model answer each prompt, greedily.

    Args:
        model: the full MoE.
        tokenizer: its tokenizer.
        documents: prompts.
        max_new_tokens: longest answer.
        batch_size: prompts at a time.
        progress: told of each batch.

    Returns:
        For each document the ids of prompt and answer as one sequence, the end token included where it came; exactly
        what the model saw and wrote.

    Raises:
        BadData: no prompts, or an empty one.
        BadConfig: `max_new_tokens` below 1, or a tokenizer of another model.
    """
    if max_new_tokens < 1:
        raise BadConfig(f"max_new_tokens is {max_new_tokens}", hint="choose at least 1")
    vocabulary.check(tokenizer, vocabulary.embedding_rows(model))
    asked = [prompt_ids(tokenizer, document.text) for document in documents]
    # Sampling knobs of the model's own config would be warned about beside greedy generation.
    settings: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
    if ends := _end_tokens(model, tokenizer):
        settings["eos_token_id"] = ends
    written = record_generation(
        model,
        asked,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        statistics=(),
        keep_choices=False,
        fingerprint="",
        progress=progress,
        **settings,
    ).tokens
    pairs = zip(asked, written, documents, strict=True)
    return [TokenizedDocument(ids + new, d.domain, number) for number, (ids, new, d) in enumerate(pairs)]


def with_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Document]:
    """Let the model answer each prompt and put the answer behind it; see `answer_tokens`.

    With a chat template the texts hold the special tokens by name, as the template and the model write them, so that
    tokenizing them without further special tokens gives what the model saw. Domains and sources stay.
    """
    sequences = answer_tokens(
        model, tokenizer, documents, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    return [_joined(tokenizer, document, s.ids) for document, s in zip(documents, sequences, strict=True)]


def _joined(tokenizer: PreTrainedTokenizerBase, document: Document, ids: Sequence[int]) -> Document:
    asked = prompt_ids(tokenizer, document.text)
    # Decoded together, then cut: many tokenizers drop the space before the first word of what they decode.
    whole, before = (_decode(tokenizer, part) for part in (ids, asked))
    answer = whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, ids[len(asked) :])
    return Document(prompt_text(tokenizer, document.text) + answer, document.domain, document.source)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=not _chats(tokenizer)))


def _chats(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the model's end tokens and the tokenizer's."""
    stated: Any = getattr(model.generation_config, "eos_token_id", None)
    found = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id]
    return sorted({int(i) for i in found if i is not None})


def demonstrations(items: Sequence[T], count: int = DEMONSTRATIONS, *, seed: int = 0) -> list[T]:
    """The longest texts of each domain: by tokens where they are tokenized, else by characters.

    Args:
        items: answered prompts.
        count: how many of each domain; fewer where it has fewer.
        seed: decides among texts of one length.

    Returns:
        Those chosen, in the order given.

    Raises:
        BadConfig: `count` below 1.
        BadData: there is nothing to choose from.
    """
    if count < 1:
        raise BadConfig(f"{count} demonstrations", hint="choose at least 1; the paper takes 25")
    if not items:
        raise BadData("there are no texts to choose demonstrations from", hint="give at least one")
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -_length(items[i]))
    chosen: dict[str, list[int]] = {}
    for i in order:
        of_domain = chosen.setdefault(items[i].domain, [])
        if len(of_domain) < count:
            of_domain.append(i)
    return [items[i] for i in sorted(i for group in chosen.values() for i in group)]


def _length(item: Document | TokenizedDocument) -> int:
    return len(item.ids) if isinstance(item, TokenizedDocument) else len(item.text)
