"""Refuse what a hostile or damaged folder may hold, before any library that trusts it looks at it.

Nothing here allocates from a size that a file claims, follows a link out of the folder, unpickles, or runs code.
Two kinds of failure are kept apart: `BadCheckpoint` for damage that honest software leaves behind (a truncated
download, a missing shard) and `UnsafeInput` for what only a crafted file contains.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moekit._files import open_own, open_regular, read_bytes, read_text, require_regular
from moekit.checkpoint.header import DTYPE_BITS, FLOAT_DTYPES, Header, TensorInfo, load_tensors, read_header
from moekit.checkpoint.strictjson import MAX_INDEX_BYTES, parse_json, read_json
from moekit.errors import UnsafeInput, UnsupportedModel

__all__ = [
    "DTYPE_BITS",
    "FLOAT_DTYPES",
    "MAX_INDEX_BYTES",
    "PICKLE_SUFFIXES",
    "Header",
    "TensorInfo",
    "check_name",
    "load_tensors",
    "newer_transformers",
    "open_own",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_header",
    "read_json",
    "read_text",
    "refuse_foreign_kernels",
    "refuse_links_and_adapters",
    "refuse_pickles",
    "refuse_remote_code",
    "require_regular",
]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LOADED_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".tiktoken", ".py"})
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What Linux and all its file systems allow for one part of a path, in bytes.
_LONGEST_NAME = 255
# Where transformers looks for further chat templates.
_TEMPLATES = "additional_chat_templates"
# Keys of a config by which transformers takes code for attention or experts; "org/name" is fetched from the hub.
_KERNEL_KEYS = frozenset(
    f"{prefix}{part}_implementation{suffix}"
    for prefix in ("", "_")
    for part in ("attn", "experts")
    for suffix in ("", "_internal")
)


def _within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _hub_blobs(folder: Path) -> Path | None:
    """The blob folder of a hub cache snapshot (`models--org--name/snapshots/<commit>`), whose links are legal."""
    if folder.parent.name == "snapshots" and "--" in folder.parent.parent.name:
        return folder.parent.parent / "blobs"
    return None


def check_name(folder: str | Path, name: str) -> Path:
    """Turn a file name that a folder's own files state into a path, if it stays inside.

    Args:
        folder: model folder.
        name: relative name, as an index states it.

    Returns:
        `folder / name`, an existing regular file, or one that does not exist.

    Raises:
        UnsafeInput: absolute, with "..", a link that leaves the folder (other than into the hub cache's own blobs), or
            no regular file.
    """
    root = Path(folder)
    pure = Path(name) if name else None
    if pure is None or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts:
        raise UnsafeInput(
            f"the name {name!r} leads out of the folder", file=root, hint="do not use this model; report it to its host"
        )
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UnsafeInput(f"no file can be called {name!r}", file=root, hint="do not use this model") from None
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in pure.parts):
        raise UnsafeInput(
            f"the name {name!r} is longer than any file's may be", file=root, hint="do not use this model"
        )
    path = root / pure
    real, real_root = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    blobs = _hub_blobs(real_root)
    if not _within(real, real_root) and not (blobs and _within(real, Path(os.path.realpath(blobs)))):
        raise UnsafeInput(
            f"{name!r} is a link that leads out of the folder, to {real}",
            file=root,
            hint="copy the file into the folder if you trust it",
        )
    try:
        require_regular(real)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        raise UnsafeInput(f"{name!r} is no regular file", file=root, hint="do not use this model") from None
    return path


def refuse_links_and_adapters(folder: str | Path) -> None:
    """Refuse what would make transformers read from elsewhere: links out of the folder, pipes, and adapter configs.

    Raises:
        UnsafeInput: a file that a loader may open is a link out of the folder, or no plain file.
        UnsupportedModel: the folder is an adapter, which names a base model to load instead.
    """
    root = Path(folder)
    for entry in sorted([*root.iterdir(), *root.glob(f"{_TEMPLATES}/*")]):
        if entry.suffix in _LOADED_SUFFIXES and (entry.is_symlink() or not entry.is_dir()):
            check_name(root, entry.relative_to(root).as_posix())
    if (root / "adapter_config.json").exists():
        raise UnsupportedModel(
            "this is an adapter, not a model",
            file=root,
            hint="merge it into its base model first (peft: merge_and_unload, then save_pretrained)",
        )


def refuse_pickles(folder: str | Path) -> None:
    """Refuse a folder whose weights are pickles only.

    Raises:
        UnsafeInput: naming the pickles and the safe conversion.
    """
    root = Path(folder)
    names = sorted(entry.name for entry in root.iterdir())
    pickles = [n for n in names if n.endswith(PICKLE_SUFFIXES) and n not in {"training_args.bin", "optimizer.pt"}]
    if pickles and not any(n.endswith(".safetensors") for n in names):
        raise UnsafeInput(
            f"the weights are pickles ({', '.join(pickles[:5])}{', ...' if len(pickles) > 5 else ''}): reading one can "
            "run any code",
            file=root,
            hint="take a revision with .safetensors files (the hub's safetensors/convert space makes one), or convert "
            "in a sandbox: torch.load(file, weights_only=True), then safetensors.torch.save_file",
        )


def refuse_remote_code(
    config: Mapping[str, Any], *, allow: bool = False, revision: str | None = None, file: str | Path | None = None
) -> None:
    """Refuse a model that stock transformers cannot run without code from its repository.

    A config may name remote code (`auto_map`) beside an implementation that transformers has itself; the latter is
    used then and nothing is refused.

    Args:
        config: parsed config.json.
        allow: the user's explicit flag.
        revision: what the user pinned; code from the hub needs a full commit hash.
        file: for the message.

    Raises:
        UnsupportedModel: naming the model type and the way out.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES:
        return
    code, newer = config.get("auto_map"), newer_transformers(config)
    if not isinstance(code, Mapping) or not code:
        raise UnsupportedModel(
            f"transformers knows no model type {model_type!r}",
            file=file,
            hint=newer or "a newer transformers may know it",
        )
    if not allow:
        raise UnsupportedModel(
            f"transformers knows no model type {model_type!r}: it needs code from its repository "
            f"({', '.join(sorted({str(value) for value in code.values()})[:4])}), which is not run",
            file=file,
            hint=(f"{newer}; " if newer else "")
            + "commands never run it; from Python: read it, then moekit.load(..., allow_remote_code=True, "
            "revision=FULL_COMMIT_HASH)",
        )
    from_hub = any("--" in str(value) for value in code.values()) or not (file is not None and Path(file).exists())
    if from_hub and not (revision and _COMMIT.fullmatch(revision)):
        raise UnsupportedModel(
            "remote code runs only from a pinned revision",
            file=file,
            hint="pass revision=<the full 40-digit commit hash you have read>",
        )


def newer_transformers(config: Mapping[str, Any]) -> str | None:
    """What to do where a config was written by a newer transformers than the one that is installed; None if not."""
    import transformers
    from packaging.version import InvalidVersion, Version

    try:
        wrote, here = Version(str(config.get("transformers_version"))), Version(transformers.__version__)
    except InvalidVersion:
        return None
    if wrote <= here:
        return None
    return f"transformers {wrote} wrote this config, {here} is installed: pip install -U 'transformers>={wrote}'"


def refuse_foreign_kernels(config: Mapping[str, Any], *, allow: bool = False, file: str | Path | None = None) -> None:
    """Refuse a config that names code on the hub for attention or experts, such as `_attn_implementation: org/name`.

    Args:
        config: parsed config.json.
        allow: the user's explicit flag for remote code; the kernel must then be pinned, "org/name@<commit hash>".
        file: for the message.

    Raises:
        UnsafeInput: naming the key and the kernel.
    """
    for key, value in _kernels(config):
        pinned = _COMMIT.fullmatch(value.partition("@")[2].partition(":")[0])
        if not (allow and pinned):
            raise UnsafeInput(
                f"{key} is {value!r}: code of that repository on the hub, which is not run",
                file=file,
                hint='remove the key ("sdpa" or "eager" run everywhere), or pin org/name@<the full 40-digit commit '
                "hash you have read> and pass allow_remote_code=True",
            )


def _kernels(config: Any) -> Iterator[tuple[str, str]]:
    """Key and value of all that names a repository, at any depth."""
    if isinstance(config, list):
        for item in config:
            yield from _kernels(item)
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        if key in _KERNEL_KEYS:
            values = value.values() if isinstance(value, Mapping) else [value]
            yield from ((key, item) for item in values if isinstance(item, str) and "/" in item)
        yield from _kernels(value)
