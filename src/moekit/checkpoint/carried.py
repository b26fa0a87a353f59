"""Carry along what a source checkpoint holds beyond the model that was loaded from it.

A model has no place for multi-token-prediction layers, nor a language model for the towers of a folder that names no
class with them: transformers leaves them behind when it loads, and would save a folder without them. Here their bytes
are copied from the source, and the source's config is kept but for what has changed: the new folder loads in the class
that the source loads in.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.config_file import announced_mtp, edited_config, without_mtp
from moekit.checkpoint.expected import describe, stated_differences
from moekit.checkpoint.experts import expert_counts, mtp_tensors
from moekit.checkpoint.folder import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, Checkpoint, listed, read_tensors
from moekit.checkpoint.meta import model_config
from moekit.checkpoint.names import stated_experts, text_config, with_text_config
from moekit.checkpoint.provenance import Origin
from moekit.checkpoint.record import Expectations, Record
from moekit.checkpoint.safety import DTYPE_BITS, TensorInfo, read_json
from moekit.checkpoint.shards import ShardWriter, index_text
from moekit.checkpoint.small_files import small_files
from moekit.errors import BadCheckpoint, BadConfig, MoekitError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

Mtp = Literal["keep", "drop"]
# What the config of the source says of its class, and what loading adds to a config in memory.
_KEPT_KEYS = frozenset(
    {"architectures", "model_type", "auto_map", "quantization_config", "transformers_version", "_name_or_path"}
)
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Carried:
    """What goes from a source into a new folder as it is.

    Attributes:
        source: opened, known to be the one that the model was loaded from; None where nothing is carried.
        tensors: to copy.
        left: names of what is left out on purpose.
        left_class: that the source names, and the new folder does not.
        files: folder that small files, such as an image processor's settings, are copied from.
    """

    source: Checkpoint | None = None
    tensors: tuple[TensorInfo, ...] = ()
    left: tuple[str, ...] = ()
    left_class: tuple[str, ...] = field(default=())
    files: Path | None = None

    @property
    def nbytes(self) -> int:
        """Bytes to copy."""
        return sum(info.nbytes for info in self.tensors)

    @property
    def note(self) -> str | None:
        """What was left out, for the record; None if nothing."""
        parts = [f"{len(self.left)} tensors that the model has no place for: {listed(list(self.left), 3)}"]
        parts = parts if self.left else []
        parts += [f"the class {', '.join(self.left_class)}"] if self.left_class else []
        return "; ".join(parts) or None


def carried(origin: Origin | None, *, drop_unknown: bool = False, mtp: Mtp = "keep") -> Carried:
    """Find out what a new folder must take over from the source, before anything is written.

    Args:
        origin: what the source holds beyond the model; None if nothing.
        drop_unknown: leave all of it out; the new folder is then of the model's own class.
        mtp: whether multi-token-prediction layers go along.

    Raises:
        BadCheckpoint: the source is gone or has changed; names what would be lost.
    """
    if origin is None:
        return Carried()
    if drop_unknown:
        files = Path(origin.folder) if origin.files and Path(origin.folder).is_dir() else None
        return Carried(left=origin.tensors, left_class=origin.architectures, files=files)
    source = _opened(origin)
    left = mtp_tensors(source) & set(origin.tensors) if mtp == "drop" else set()
    kept = tuple(source.tensors[name] for name in origin.tensors if name not in left)
    return Carried(source, kept, tuple(name for name in origin.tensors if name in left), files=source.path)


def _opened(origin: Origin) -> Checkpoint:
    what = [f"{len(origin.tensors)} tensors ({listed(list(origin.tensors), 3)})"] if origin.tensors else []
    what += [f"the class {', '.join(origin.architectures)}"] if origin.architectures else []
    what += [", ".join(origin.files)] if origin.files else []
    hint = "put the source back, or leave them out on purpose (drop_unknown=True, --drop-unknown)"
    try:
        source = Checkpoint.open(origin.folder, local_files_only=True)
        changed = source.fingerprint != origin.fingerprint or not set(origin.tensors) <= set(source.tensors)
    except MoekitError as error:
        reason = f"it cannot be opened any more ({error.message})"
        raise BadCheckpoint(
            f"the model was loaded from here, but {reason}: {' and '.join(what)} would be lost",
            file=origin.folder,
            hint=hint,
        ) from error
    if changed:
        raise BadCheckpoint(
            f"the model was loaded from here, but the folder has changed since: {' and '.join(what)} would be lost",
            file=origin.folder,
            hint=hint,
        )
    return source


def write_carried(
    work: Carried,
    folder: Path,
    after: PreTrainedConfig,
    *,
    max_shard_bytes: int,
    counts: Mapping[int, int] | None = None,
) -> None:
    """Complete a folder that a model was just saved into: tensors, config and small files of the source.

    Args:
        work: what goes along.
        folder: with the model's shards and config.
        after: the model's config.
        max_shard_bytes: of one shard.
        counts: decoder layer -> E, where layers differ.

    Raises:
        BadConfig: multi-token-prediction layers have another number of experts than the changed model.
        BadCheckpoint: the class that the source's config names would not load the folder.
    """
    source = work.source
    if source is not None:
        if work.tensors:
            append_tensors(folder, [(info, source.path / info.shard) for info in work.tensors], max_shard_bytes)
        _check_mtp(work, source, after)
        atomic_write(folder / CONFIG_FILE, json.dumps(_config(source, after), indent=2) + "\n")
        _check_class(folder, source, counts or {})
    if work.files is not None:
        for file in small_files(work.files):
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    _announce_what_is_there(folder)
    if work.note is not None:
        logger.warning("left out on purpose: %s", work.note)


def _config(source: Checkpoint, after: PreTrainedConfig) -> dict[str, Any]:
    """The source's config.json, with what has changed in memory."""
    before: Any = model_config(source)
    raw = dict(source.config)
    keep = _KEPT_KEYS | set(_DTYPE_KEYS)
    if type(after) is type(before):
        raw = edited_config(raw, before, after, keep=keep)
    else:
        inner = edited_config(text_config(raw), before.get_text_config(), after, keep=keep)
        raw = with_text_config(raw, inner)
    return _with_dtype(raw, str(after.dtype).removeprefix("torch."))


def _with_dtype(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says what the weights are, under the keys that it has for that."""
    changed: dict[str, Any] = {key: dtype for key in _DTYPE_KEYS if key in raw} or {"dtype": dtype}
    made = {**raw, **changed}
    inner = text_config(raw)
    return made if inner is raw else with_text_config(made, _renamed(inner, dtype))


def _renamed(values: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {key: dtype if key in _DTYPE_KEYS else value for key, value in values.items()}


def _check_mtp(work: Carried, source: Checkpoint, after: PreTrainedConfig) -> None:
    """Multi-token-prediction layers must have as many experts as the config says of all layers."""
    stated, names = stated_experts(after.to_dict()), mtp_tensors(source)
    own = {info.name: info for info in work.tensors if info.name in names}
    for layer, count in expert_counts(own, stacks=True).items():
        if stated is not None and count != stated:
            raise BadConfig(
                f"this multi-token-prediction layer has {count} experts, the changed model {stated}",
                file=source.path,
                layer=layer,
                hint='leave it out (mtp="drop"): it only speeds up decoding, and answers stay the same',
            )


def _check_class(folder: Path, source: Checkpoint, counts: Mapping[int, int]) -> None:
    """The class that the config names must find all that it found in the source."""
    written = Checkpoint.open(folder)
    written.record = Record(command="", expectations=Expectations(experts=dict(counts)))
    before, after = stated_differences(source), stated_differences(written)
    if before is None or after is None or after.within(before):
        return
    raise BadCheckpoint(
        f"{written.config['architectures'][0]} would not load this: {describe(after, written.tensors)}",
        file=source.path,
        hint="save it as the model's own class (drop_unknown=True, --drop-unknown)",
    )


def _announce_what_is_there(folder: Path) -> None:
    """A config must not announce multi-token-prediction layers that no tensor holds."""
    checkpoint = Checkpoint.open(folder)
    if announced_mtp(checkpoint.config) and not mtp_tensors(checkpoint):
        raw = read_json(folder / CONFIG_FILE)
        atomic_write(folder / CONFIG_FILE, json.dumps(without_mtp(raw), indent=2) + "\n")


def append_tensors(folder: Path, pieces: Sequence[tuple[TensorInfo, Path]], max_shard_bytes: int) -> None:
    """Add tensors of other files to a folder's shards, byte for byte; names of shards and index follow.

    Args:
        folder: with a model.safetensors, or shards and an index.
        pieces: each tensor with the file that it lies in.
        max_shard_bytes: of one shard; what fits goes into the last one.

    Raises:
        BadConfig: a name that the folder holds already.
    """
    held = read_tensors(folder)
    files = sorted({info.shard for info in held.values()})
    last = [(info, folder / info.shard) for info in held.values() if info.shard == files[-1]]
    pieces = sorted(pieces, key=lambda piece: -DTYPE_BITS[piece[0].dtype])
    if sum(info.nbytes for info, _ in (*last, *pieces)) <= max_shard_bytes:
        pieces = sorted((*last, *pieces), key=lambda piece: -DTYPE_BITS[piece[0].dtype])
        files.pop()
    kept = [name for name, info in held.items() if info.shard in files]
    if twice := sorted(set(kept) & {info.name for info, _ in pieces}):
        raise BadConfig(f"tensor {twice[0]!r} is written twice", file=folder)
    fresh = folder / "carried.partial"
    fresh.mkdir()
    with ShardWriter(fresh, max_shard_bytes) as writer:
        for info, path in pieces:
            writer.copy(info, path)
    _join(folder, files, held, fresh)


def _join(folder: Path, files: list[str], held: dict[str, TensorInfo], fresh: Path) -> None:
    """Bring fresh shards to those that stay, number all of them and write the index."""
    added = read_tensors(fresh)
    new = sorted({info.shard for info in added.values()})
    count = len(files) + len(new)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE_FILE]
    old_names, new_names = dict(zip(files, names, strict=False)), dict(zip(new, names[len(files) :], strict=True))
    for file in sorted({info.shard for info in held.values()} - set(files)):
        (folder / file).unlink()
    for file, name in reversed(old_names.items()):  # numbers of the last ones are free
        (folder / file).rename(folder / f"{name}.kept")
    for name in old_names.values():
        (folder / f"{name}.kept").rename(folder / name)
    for file, name in new_names.items():
        (fresh / file).rename(folder / name)
    shutil.rmtree(fresh)
    (folder / INDEX_FILE).unlink(missing_ok=True)
    if count > 1:
        weight_map = {n: old_names[i.shard] for n, i in held.items() if i.shard in old_names}
        weight_map |= {n: new_names[i.shard] for n, i in added.items()}
        total = sum(i.nbytes for i in held.values() if i.shard in old_names) + sum(i.nbytes for i in added.values())
        atomic_write(folder / INDEX_FILE, index_text(weight_map, total))
