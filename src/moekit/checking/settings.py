"""Are config, tokenizer and generation settings what was recorded, and what the parent has?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig

from moekit.checking.report import Finding, Severity, from_error
from moekit.checkpoint.config_file import MTP_KEYS
from moekit.checkpoint.digest import config_digest, config_settings, file_digests
from moekit.checkpoint.folder import CONFIG_FILE, Checkpoint
from moekit.checkpoint.names import EXPERT_COUNT_KEYS, TOP_K_KEYS, text_config
from moekit.checkpoint.record import RECORD_FILE
from moekit.checkpoint.safety import check_name, read_json
from moekit.errors import MoekitError

_MAX_BYTES = 200_000_000
GENERATION_FILE = "generation_config.json"
# Keys that do not change what a forward pass computes from given weights.
_QUIET = frozenset(
    {
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "router_z_loss_coef",
        "torch_dtype",
        "use_cache",
        *MTP_KEYS,
    }
)
# What pruning, merging and conversions change on purpose.
_CHANGED_ON_PURPOSE = frozenset({*EXPERT_COUNT_KEYS, *TOP_K_KEYS, "n_group", "topk_group", "num_expert_group"})
# A tokenizer whose file changed gives other ids to the same text.
_DECIDES_IDS = ("tokenizer.json", "vocab", "merges.txt", ".model", ".tiktoken", "added_tokens.json")
_RESTORE = "restore it from a copy, or make the checkpoint again from its parent (moekit undo)"


def _is_quiet(key: str) -> bool:
    return any(part in _QUIET for part in key.split("."))


def check_recorded_settings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Config and files against the record."""
    record = checkpoint.record
    if record is None:
        return
    yield from _config(checkpoint)
    yield from _files(checkpoint, record.expectations.files)


def check_fingerprint(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The record's fingerprint against the folder's, for a folder in which all else is as recorded."""
    told = None if checkpoint.record is None else checkpoint.record.fingerprint
    if told is not None and told != checkpoint.fingerprint:
        yield Finding(
            severity="error",
            code="record-fingerprint",
            message=f"the record's fingerprint is {told[:12]}, that of the folder {checkpoint.fingerprint[:12]}",
            file=str(checkpoint.path / RECORD_FILE),
            hint="the record was edited: restore it from a copy; artefacts made for this model name the fingerprint",
        )


def _config(checkpoint: Checkpoint) -> Iterator[Finding]:
    assert checkpoint.record is not None
    expected = checkpoint.record.expectations
    if expected.config in {None, config_digest(checkpoint.config)}:
        return
    changes = _changes(expected.settings, config_settings(checkpoint.config)) if expected.settings else {}
    loud = {key: text for key, text in changes.items() if not _is_quiet(key)}
    told = loud or changes
    what = "; ".join(f"{key} is {new}, recorded was {old}" for key, (new, old) in sorted(told.items())[:5])
    yield Finding(
        severity="error" if loud else "warning",
        code="config-changed",
        message=f"the config was edited after the checkpoint was written{': ' + what if what else ''}"
        + ("; the model computes something else" if loud else ""),
        file=str(checkpoint.path / CONFIG_FILE),
        hint=_RESTORE,
    )


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Key -> (now, before) of what differs."""
    keys = [key for key in {*old, *new} if old.get(key) != new.get(key)]
    return {key: (new.get(key, "missing"), old.get(key, "missing")) for key in keys}


def _files(checkpoint: Checkpoint, expected: Mapping[str, str]) -> Iterator[Finding]:
    found = file_digests(checkpoint.path)
    for name, digest in expected.items():
        if found.get(name) == digest:
            continue
        ids = name == "tokenizer.json" or any(part in name for part in _DECIDES_IDS)
        state = "is missing" if name not in found else "is not what was recorded"
        yield Finding(
            severity="error" if ids else "warning",
            code="tokenizer-changed" if ids else "file-changed",
            message=f"{name} {state}" + (": the same text may become other tokens" if ids else ""),
            file=str(checkpoint.path / name),
            hint=_RESTORE,
        )


def check_generation_file(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Whether transformers can read generation_config.json, and its token ids are ids of the model."""
    path = check_name(checkpoint.path, GENERATION_FILE)
    if not path.exists():
        return
    hint = "restore it from a copy, or delete it to generate with transformers' defaults"
    try:
        content = read_json(path)
        GenerationConfig.from_dict(dict(content))
    except MoekitError as error:
        yield from_error(error, "generation-config")
        return
    except Exception as error:  # transformers validates in many ways
        yield _generation(checkpoint, "error", f"transformers refuses it: {str(error).splitlines()[0][:200]}", hint)
        return
    rows = text_config(checkpoint.config).get("vocab_size")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = content.get(key) if isinstance(content.get(key), list) else [content.get(key)]
        for value in ids or ():
            if isinstance(value, int) and isinstance(rows, int) and not -1 <= value < rows:
                message = f"{key} is {value}, but the embedding has {rows} rows"
                yield _generation(checkpoint, "error", message, hint)


def _generation(checkpoint: Checkpoint, severity: Severity, message: str, hint: str) -> Finding:
    file = str(checkpoint.path / GENERATION_FILE)
    return Finding(severity=severity, code="generation-config", message=message, file=file, hint=hint)


def check_parent_settings(child: Checkpoint, parent: Checkpoint) -> Iterator[Finding]:
    """Values of the language model's config and the tokenizer against those of the parent.

    A conversion into another family is not compared: its config is another one by purpose.
    """
    yield from _parent_tokenizer(child, parent)
    ours, theirs = text_config(child.config), text_config(parent.config)
    if ours.get("model_type") != theirs.get("model_type"):
        return
    mine, other = config_settings(ours), config_settings(theirs)
    told = [
        f"{key} is {mine[key]}, the parent's {other[key]}"
        for key in sorted(mine.keys() & other.keys())
        if mine[key] != other[key] and not _is_quiet(key) and key.rpartition(".")[2] not in _CHANGED_ON_PURPOSE
        if not key.startswith("quantization_config.")
    ]
    if told:
        yield Finding(
            severity="warning",
            code="config-differs",
            message=f"the config computes something else than the parent's: {'; '.join(told[:5])}",
            file=str(child.path / CONFIG_FILE),
            hint="right if it was changed on purpose; else take the parent's value",
        )


def _parent_tokenizer(child: Checkpoint, parent: Checkpoint) -> Iterator[Finding]:
    found = [_tokenizer(checkpoint) for checkpoint in (child, parent)]
    if None not in found and found[0] != found[1]:
        yield Finding(
            severity="warning",
            code="tokenizer-differs",
            message="the tokenizer makes other tokens of the same text than the parent's",
            file=str(child.path / "tokenizer.json"),
            hint="right if the vocabulary was changed on purpose; else copy the parent's tokenizer",
        )


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What of tokenizer.json decides ids; None without one, or where it is damaged, which is told elsewhere."""
    try:
        path = check_name(checkpoint.path, "tokenizer.json")
        content = read_json(path, limit=_MAX_BYTES) if path.exists() else None
    except MoekitError:
        return None
    keys = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")
    return None if content is None else {key: content.get(key) for key in keys}
