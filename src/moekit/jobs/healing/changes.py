"""Which tensors of a model are not what they were, by their bytes on disk."""

from __future__ import annotations

from typing import Any

from moekit.checkpoint import Checkpoint
from moekit.checkpoint.digest import tensor_digests
from moekit.checkpoint.record import TensorExpectation


def changed_tensors(before: Checkpoint, after: Checkpoint) -> dict[str, Any]:
    """Count the tensors that differ, with their bytes, and name them.

    Args:
        before: the model as it was.
        after: what became of it, written with a record.
    """
    was, now = _digests(before), _digests(after)
    names = [name for name, told in now.items() if name not in was or told.sha256 != was[name].sha256]
    return {
        "tensors": len(names),
        "of": len(now),
        "bytes": sum(after.tensors[name].nbytes for name in names),
        "names": names,
    }


def _digests(checkpoint: Checkpoint) -> dict[str, TensorExpectation]:
    """Those of its record, which `moekit check` proves; else they are taken."""
    known = {} if checkpoint.record is None else checkpoint.record.expectations.tensors
    missing = [info for name, info in checkpoint.tensors.items() if name not in known]
    return {**known, **tensor_digests(checkpoint.path, missing)} if missing else dict(known)
