"""Whether two models were trained alike, by their records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moekit.checkpoint import Record
    from moekit.trace.meta import TraceMeta

# What training notes of a run, beside its settings and its start.
_RUN = ("steps", "tokens", "precision", "trained")


def trained_alike(one: TraceMeta, other: TraceMeta) -> bool:
    """Whether the models of two traces come from one start, trained with the same settings on as many tokens.

    They may differ in what routes them. False where either has no record, was not trained, or has changed since.
    """
    first, second = _training(one), _training(other)
    if first is None or second is None or first.parent_fingerprint is None:
        return False
    return (
        first.parent_fingerprint == second.parent_fingerprint
        and first.seed == second.seed
        and first.config == second.config
        and all(first.scores.get(name) == second.scores.get(name) for name in _RUN)
    )


def _training(meta: TraceMeta) -> Record | None:
    """The record of the model that was traced, if that was trained and is still there."""
    from moekit.checkpoint import Record
    from moekit.errors import MoekitError

    folder = Path(meta.model)
    try:
        record = Record.read(folder) if meta.model and folder.is_dir() else None
    except MoekitError:
        return None  # a damaged record proves nothing
    if record is None or "losses" not in record.scores or record.fingerprint != meta.fingerprint:
        return None
    return record
