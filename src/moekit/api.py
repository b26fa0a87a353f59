"""`moekit.load` and `moekit.save`: the checkpoint functions, with the runtime parts that a record names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit._progress import Progress
from moekit.checkpoint import model as checkpoint_model
from moekit.checkpoint.carried import Mtp
from moekit.checkpoint.fingerprint import provenance_of
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.hollow import hollow_names
from moekit.checkpoint.left_out import layers_left_out
from moekit.checkpoint.model import read_extra_tensors
from moekit.checkpoint.record import Record
from moekit.checkpoint.shards import DEFAULT_SHARD_BYTES
from moekit.errors import BadConfig
from moekit.experts.packed_model import attach_packed, packed_of
from moekit.runtime.saved import entries, give_back, restore

__all__ = ["load", "save"]

_EXTRA_NAME = re.compile(r"layers\.\d+\.\w[\w.-]*")


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    parts: bool = True,
    allow_remote_code: bool = False,
) -> PreTrainedModel:
    """Open, verify and load a checkpoint, and attach the runtime parts that its record names.

    Args:
        model: local folder or hub id.
        revision: of a hub model.
        token: hub token.
        dtype: of the weights in memory; "auto" keeps the config's.
        device: "auto" takes a GPU if there is one; ignored with `device_map`.
        device_map: as in transformers.
        parts: whether to attach the record's parts (a routing policy, say), and to compute packed experts as they lie;
            False gives the stock model, with floats, and with the matrices of experts that a part alone holds.
        allow_remote_code: see `Checkpoint.open`.

    Returns:
        The model in eval mode.

    Raises:
        BadCheckpoint, UnsafeInput, UnsupportedModel: see `Checkpoint.open`; or the parts do not fit the model.
        BadConfig: a part is unknown here (install the package that it came from).
    """
    loaded = checkpoint_model.load(
        model,
        revision=revision,
        token=token,
        dtype=dtype,
        device=device,
        device_map=device_map,
        allow_remote_code=allow_remote_code,
        keep_packed=parts,
    )
    origin = provenance_of(loaded)
    record = None if origin is None else origin.record
    if origin is not None and parts and hollow_names(loaded) and not layers_left_out(record):
        attach_packed(loaded, Checkpoint.open(origin.path, allow_remote_code=allow_remote_code))
    if origin is not None and record is not None and record.parts and (parts or layers_left_out(record)):
        restore(loaded, record.parts, read_extra_tensors(origin.path))
        if not parts:
            give_back(loaded)
    return loaded


def save(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    record: Record | None = None,
    extra_tensors: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    drop_unknown: bool = False,
    mtp: Mtp = "keep",
    progress: Progress | None = None,
) -> Record:
    """Save a model as a stock folder with its record, its card and the runtime parts that are attached to it.

    Like `moekit.checkpoint.save`; the parts, with what they have learned, go into the two extra files by themselves.

    Args:
        model: the model, with or without parts.
        folder: where to.
        tokenizer: saved beside the weights.
        record: how the model was made; without one, that Python saved it and what it was loaded from.
        extra_tensors: for `moekit.safetensors`; named "layers.<layer>.<what>".
        overwrite: replace a folder that is there.
        max_shard_bytes: size of a shard.
        drop_unknown: leave out what the source holds beyond the model, such as extra layers; else it is copied.
        mtp: whether multi-token-prediction layers of the source go along ("keep", "drop").
        progress: told how far it is.

    Returns:
        The record as written.

    Raises:
        BadConfig: a name of `extra_tensors` that nothing could read again, or a part that is not in the catalogue.
        BadConfig, BadCheckpoint, OutOfBudget: see `moekit.checkpoint.save`.
    """
    if record is None:
        origin = provenance_of(model)
        record = Record(
            command="moekit.save",
            parent=str(origin.path) if origin else None,
            parent_fingerprint=origin.fingerprint if origin else None,
        )
    extra = dict(extra_tensors or {})
    _check_names(extra)
    found, tensors = entries(model)
    record = record.model_copy(update={"parts": found})
    extra |= tensors
    return checkpoint_model.save(
        model,
        folder,
        tokenizer=tokenizer,
        record=record,
        extra_tensors=extra,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        drop_unknown=drop_unknown,
        mtp=mtp,
        packed=packed_of(model),
        progress=progress,
    )


def _check_names(extra: Mapping[str, Tensor]) -> None:
    """Tensors that go beside the weights must say their layer; names of policies are taken."""
    wrong = sorted(name for name in extra if not _EXTRA_NAME.fullmatch(name))
    if wrong:
        raise BadConfig(
            f"an extra tensor cannot be called {wrong[0]!r}",
            hint=f'name the layer that it belongs to, such as "layers.0.{wrong[0].rpartition(".")[2] or "scale"}"',
        )
