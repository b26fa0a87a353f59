"""Which checkpoint a model in memory was loaded from, and what that holds beyond the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from moekit.checkpoint.expected import unknown_tensors
from moekit.checkpoint.fingerprint import STAMP, live_fingerprint, provenance_of
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.layout import Layout
from moekit.checkpoint.names import text_path
from moekit.checkpoint.record import Record
from moekit.checkpoint.small_files import small_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Origin(BaseModel):
    """What a checkpoint holds beyond the model that was made of it.

    Attributes:
        folder: of the checkpoint.
        fingerprint: of the checkpoint.
        tensors: names of those that the model has no place for: multi-token-prediction layers, vision towers.
        architectures: that the checkpoint's config names, where the model is of another class.
        files: beside the weights of a model of several parts, such as its image processor's settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    fingerprint: str
    tensors: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """Stamp that `load` leaves on a model; read it by `fingerprint.provenance_of`.

    Attributes:
        path: folder it was loaded from.
        fingerprint: of the checkpoint.
        record: its record, if any.
        live: fingerprint of the weights in memory right after loading; tells whether they have changed since.
        beyond: what the checkpoint holds beyond the model; None where the model is all of it.
    """

    path: Path
    fingerprint: str
    record: Record | None
    live: str
    beyond: Origin | None = None


def stamp(model: PreTrainedModel, checkpoint: Checkpoint, layout: Layout) -> None:
    """Note on a model which checkpoint its weights are."""
    beyond = origin(checkpoint, layout, type(model).__name__)
    provenance = Provenance(checkpoint.path, checkpoint.fingerprint, checkpoint.record, live_fingerprint(model), beyond)
    object.__setattr__(model, STAMP, provenance)


def origin(checkpoint: Checkpoint, layout: Layout, class_name: str) -> Origin | None:
    """What a checkpoint holds beyond a model of it; None if nothing.

    Args:
        checkpoint: opened and verified.
        layout: of its config.
        class_name: class of the model.
    """
    unknown = tuple(unknown_tensors(checkpoint, layout))
    stated = tuple(name for name in checkpoint.config.get("architectures") or () if isinstance(name, str))
    other = stated if class_name not in stated else ()
    files = _processor_files(checkpoint)
    if not unknown and not other and not files:
        return None
    folder = str(checkpoint.path.resolve())
    return Origin(folder=folder, fingerprint=checkpoint.fingerprint, tensors=unknown, architectures=other, files=files)


def _processor_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Files that say how a model of several parts is given images or sound; neither model nor tokenizer saves them."""
    if not text_path(checkpoint.config):
        return ()
    return tuple(file.name for file in small_files(checkpoint.path) if "processor" in file.name)


def origin_of(model: Any) -> Origin | None:
    """What the checkpoint that a model was loaded from holds beyond it; None if nothing, or if nobody knows."""
    provenance = provenance_of(model)
    return None if provenance is None else provenance.beyond
