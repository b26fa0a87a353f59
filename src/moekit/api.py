"""`moekit.load` and `moekit.save`: the checkpoint functions, with everything registered that they may need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moekit import catalogue
from moekit._progress import Progress
from moekit.checkpoint import model as checkpoint_model
from moekit.checkpoint.carried import Mtp
from moekit.checkpoint.model import load
from moekit.checkpoint.record import Record
from moekit.checkpoint.shards import DEFAULT_SHARD_BYTES
from moekit.errors import BadConfig, UnsupportedModel
from moekit.routing.attach import active_policy
from moekit.routing.restore import policy_entry  # importing it registers what restores a policy on load

__all__ = ["load", "save"]

_EXTRA_NAME = re.compile(r"layers\.\d+\.\w[\w.-]*")


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
    """Save a model as a stock folder with its record, card and, if one is attached, its routing policy.

    Like `moekit.checkpoint.save`, which see; the policy that the model routes by goes into the record by itself.

    Args:
        model: the model, stock or routed by a policy.
        folder: where to.
        tokenizer: saved beside the weights.
        record: how the model was made; without one, that Python saved it and what it was loaded from.
        extra_tensors: for `moekit.safetensors`; named "layers.<layer>.<what>".
        overwrite: replace a folder that is there.
        max_shard_bytes: size of a shard.
        drop_unknown: leave out what the source holds beyond the model, such as a vision tower; otherwise it is copied.
        mtp: whether multi-token-prediction layers of the source go along ("keep", "drop").
        progress: told how far it is.

    Returns:
        The record as written.

    Raises:
        BadConfig: a name of `extra_tensors` that nothing could read again.
        BadConfig, BadCheckpoint, OutOfBudget: see `moekit.checkpoint.save`.
    """
    if record is None:
        origin = getattr(model, "_moekit", None)
        record = Record(
            command="moekit.save",
            parent=str(origin.path) if origin else None,
            parent_fingerprint=origin.fingerprint if origin else None,
        )
    extra = dict(extra_tensors or {})
    _check_names(extra)
    try:
        active = active_policy(model) if record.policy is None else None
    except UnsupportedModel:  # a dense model: nothing routes
        active = None
    if active is not None:
        name = next(m.name for m in catalogue.methods("routing") if m.cls is type(active[0]))
        found = policy_entry(model, name)
        assert found is not None
        entry, tensors = found
        record = record.model_copy(update={"policy": entry})
        extra.update(tensors)
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
