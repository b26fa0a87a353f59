"""A tokenizer in GGUF: tokens, merges and special ids out of tokenizer.json, for the two kinds that llama.cpp runs.

Byte-level BPE is its "gpt2", where the expression that splits a text must be one that llama.cpp knows by name; BPE over
text with a byte for whatever has no token is its "llama", which joins pairs by scores: a token's is the place of the
merge that makes it, negative. Other tokenizers are left out, and the file is driven by token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit._files import read_text

# A word behind at most one sign, then numbers, signs and spaces; families differ in how many digits go together.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_SPLITS = {_SPLIT % r"\p{N}": "qwen2", _SPLIT % r"\p{N}{1,3}": "llama-bpe"}
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE_TYPE = 1, 2, 3, 4, 5, 6


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> str:
    """Write a folder's tokenizer.

    Args:
        writer: of the `gguf` package.
        folder: with tokenizer.json.
        vocab_size: tokens that the model embeds; ids without a token are filled up.

    Returns:
        What was written, or why nothing was, for people.
    """
    file = folder / "tokenizer.json"
    told = json.loads(read_text(file)) if file.is_file() else {}
    model = told.get("model") or {}
    kind, why = _kind(told, model)
    if not kind:
        writer.add_tokenizer_model("no_vocab")
        return f"none: {why}; give token ids"
    tokens, types = _tokens(told, model, vocab_size)
    writer.add_tokenizer_model("llama" if kind == "llama" else "gpt2")
    writer.add_tokenizer_pre("default" if kind == "llama" else kind)
    writer.add_token_list(tokens)
    merges = [entry if isinstance(entry, str) else " ".join(entry) for entry in model.get("merges") or []]
    if kind == "llama":
        made_by = {merge.replace(" ", "", 1): place for place, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(made_by.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(_begins_with_space(told))
    writer.add_token_types(types)
    if kind != "llama":
        writer.add_token_merges(merges)
    _add_special(writer, folder)
    return "BPE with scores (llama)" if kind == "llama" else f"byte-level BPE (gpt2, {kind})"


def _kind(told: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[str, str]:
    """The word llama, or the name of a byte-level split; "" and the reason where llama.cpp runs no such tokenizer."""
    if model.get("type") != "BPE":
        return "", f"llama.cpp runs no tokenizer of type {model.get('type')}" if model else "there is no tokenizer.json"
    if model.get("byte_fallback"):
        return "llama", ""
    *before, last = _pieces(told.get("pre_tokenizer")) or [{}]
    kinds = [piece.get("type") for piece in before]
    name = ""
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if last.get("use_regex", True):
            alone = kinds == ["Digits"] and before[0].get("individual_digits")
            name = "gpt-2" if not kinds else "smollm" if alone else ""
        elif kinds == ["Split"]:
            name = _KNOWN_SPLITS.get(before[0]["pattern"].get("Regex", ""), "")
    return name, "its text is split in a way that llama.cpp does not know by name"


def _pieces(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not part:
        return []
    return list(part["pretokenizers"]) if part.get("type") == "Sequence" else [part]


def _tokens(told: Mapping[str, Any], model: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    added = {entry["id"]: entry for entry in told.get("added_tokens") or []}
    by_id = {number: token for token, number in model["vocab"].items()}
    tokens, types = [], []
    for number in range(vocab_size):
        token = added[number]["content"] if number in added else by_id.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            types.append(_UNUSED)
            continue
        tokens.append(token)
        if token == model.get("unk_token"):
            types.append(_UNKNOWN)
        elif number in added:
            types.append(_CONTROL if added[number].get("special") else _OWN)
        else:
            types.append(_BYTE_TYPE if model.get("byte_fallback") and _BYTE.fullmatch(token) else _NORMAL)
    return tokens, types


def _begins_with_space(told: Mapping[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    parts = [part for key in ("normalizer", "pre_tokenizer") for part in _all_parts(told.get(key))]
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _all_parts(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not part:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [part, *inner]


def _add_special(writer: Any, folder: Path) -> None:
    """Ids of special tokens, whether one begins every text, and the chat template."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if isinstance(number, int):
            getattr(writer, f"add_{name}_token_id")(number)
    first = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(bool(first) and first[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
