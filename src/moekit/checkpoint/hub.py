"""Bring a hub model into the local cache: config, tokenizer and the safetensors its index names, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from moekit.checkpoint.safety import PICKLE_SUFFIXES, check_name, read_json
from moekit.errors import BadCheckpoint, UnsafeInput

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SHARD_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*\.safetensors")

# Small files that a model needs beside its weights. No code, no pickles.
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md", "LICENSE*"]
_SKIPPED = ["original/*", "onnx/*", "*/*"]


def looks_like_hub_id(model: str | Path) -> bool:
    """Whether a string can be a hub id ("org/name" or "name") rather than a path."""
    return isinstance(model, str) and _HUB_ID.fullmatch(model) is not None and not model.startswith(".")


def resolve(
    model: str | Path, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> Path:
    """The local folder of a model, downloaded if it is a hub id.

    Raises:
        BadCheckpoint: no such folder, or the hub does not give it.
        UnsafeInput: the hub has pickles only, or its index names files outside the folder.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise BadCheckpoint("this is a file, not a model folder", file=path, hint="give the folder that holds it")
    if not looks_like_hub_id(model):
        raise BadCheckpoint("there is no such folder", file=path, hint="give a model folder, or a hub id like org/name")
    return _download(str(model), revision, token, local_files_only)


def network_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises where there is no network: its errors are those of whichever HTTP client it uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError, OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def first_line(error: Exception) -> str:
    """The error's first words; its name if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _download(model: str, revision: str | None, token: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    errors: tuple[type[Exception], ...] = (*network_errors(), HFValidationError, LocalEntryNotFoundError)

    def fetch(patterns: list[str], commit: str | None) -> Path:
        try:
            return Path(
                snapshot_download(
                    model,
                    revision=commit,
                    token=token,
                    local_files_only=local_files_only,
                    allow_patterns=patterns,
                    ignore_patterns=_SKIPPED if patterns is SMALL_FILES else None,
                )
            )
        except errors as error:
            raise BadCheckpoint(
                f"{model!r} is no local folder, and the hub does not give it: {first_line(error)}",
                hint="check the name, the network and, for a gated model, the token (hf auth login)",
            ) from error

    folder = fetch(SMALL_FILES, revision)
    commit = folder.name if folder.parent.name == "snapshots" else revision
    index = check_name(folder, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index, limit=100_000_000).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else names
        for name in names:
            check_name(folder, name)
            if not _SHARD_NAME.fullmatch(name):
                raise UnsafeInput(f"the index names the file {name!r}", file=index, hint="do not use this model")
    folder = fetch([*names, "moekit.safetensors"], commit)
    if not any((folder / name).exists() for name in names) and not local_files_only:
        _refuse_without_safetensors(model, commit, token)
    return folder


def _refuse_without_safetensors(model: str, revision: str | None, token: str | None) -> None:
    from huggingface_hub import HfApi

    files = HfApi(token=token).list_repo_files(model, revision=revision)
    pickles = sorted(name for name in files if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise UnsafeInput(
            f"{model!r} has pickles only ({', '.join(pickles[:5])}): reading one can run any code",
            hint="use a revision with .safetensors files; the hub's safetensors/convert space makes one",
        )
    raise BadCheckpoint(f"{model!r} has no weights", hint="is it an adapter or a dataset?")
