"""From text to token ids, in one way for all commands.

A model is trained on texts that begin as its tokenizer begins them; without that beginning the first tokens, and with
them whatever is calibrated or measured, are out of place. Every reader of text goes through `encode` or
`encode_document`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moekit.data.formats import words
from moekit.data.text import Document
from moekit.errors import BadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]
BOS_HELP = "token that a document begins with: as the tokenizer itself does it, always, or never"


def beginning(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> list[int]:
    """Ids that stand before a document's own.

    Args:
        tokenizer: any tokenizer of transformers.
        bos: "auto" for what the tokenizer itself puts before a text, "always" for its beginning token, "never" for
            nothing.

    Raises:
        BadConfig: "always", and the tokenizer has no beginning token.
    """
    if bos == "never":
        return []
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise BadConfig("the tokenizer has no beginning token", hint="say --bos auto or --bos never")
        return [int(tokenizer.bos_token_id)]
    plain, usual = (list(tokenizer("a", add_special_tokens=told)["input_ids"]) for told in (False, True))
    starts = (n for n in range(len(usual)) if usual[n : n + len(plain)] == plain)
    return [int(i) for i in usual[: next(starts, 0)]]


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, bos: Bos = "auto") -> list[int]:
    """Token ids of a text, behind its beginning; nothing else that the tokenizer may add. Empty for an empty text."""
    ids = [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return [*beginning(tokenizer, bos), *ids] if ids else []


def encode_document(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bos: Bos = "auto",
    characters: int | None = None,
) -> list[int]:
    """Token ids of a document; a conversation is written by the tokenizer's chat template, where it has one.

    Pictures are left out: `moekit.data.pictures` reads them.

    Args:
        document: text or conversation.
        tokenizer: any tokenizer of transformers.
        bos: see `beginning`; a chat template writes its own beginning.
        characters: read of a plain text only so many.
    """
    if document.messages and getattr(tokenizer, "chat_template", None):
        turns = [{"role": role, "content": words(content)} for role, content in document.messages]
        written = str(tokenizer.apply_chat_template(turns, tokenize=False))
        return [int(i) for i in tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]]
    return encode(document.text if characters is None else document.text[:characters], tokenizer, bos=bos)
