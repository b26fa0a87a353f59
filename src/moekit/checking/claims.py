"""What a record says has stayed, byte for byte, what the parent holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moekit import catalogue
from moekit.checking.samples import layer_key
from moekit.checkpoint.experts import counts_of
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.errors import MoekitError


@dataclass(frozen=True)
class Claims:
    """What is to be the parent's, byte for byte.

    Attributes:
        rest: attention, norms, embeddings: all that belongs to no routed expert and to no router.
        experts: the routed experts that stayed, and their routers' rows.
        kept: layer, as `samples.layer_key` counts them -> which of the parent's experts each one is; layers that are
            not named have all of them, in order.
    """

    rest: bool = False
    experts: bool = False
    kept: Mapping[int, Sequence[int]] = field(default_factory=dict)


def claims_of(child: Checkpoint, parent: Checkpoint) -> Claims:
    """What a child's record says; nothing where there is none, or where it speaks of another parent."""
    record = child.record
    if record is None or record.parent_fingerprint != parent.fingerprint:
        return Claims()
    if "kept" in record.scores:
        return Claims(rest=True, experts=not rewrites(record), kept=_kept(child, record))
    if isinstance(orders := record.config.get("orders"), Mapping):
        return Claims(rest=True, experts=True, kept=_numbered(orders))
    if record.parts and record.plan_hash is not None and not record.scores:
        return Claims(rest=True, experts=True)  # routed by a plan
    name = record.config.get("method")
    converted = not counts_of(parent) and isinstance(name, str) and _known("convert", name)
    return Claims(rest=converted)


def rewrites(record: Record) -> bool:
    """Whether a record of a smaller model says that a method has rewritten the experts that stayed."""
    name = record.config.get("method")
    if not isinstance(name, str) or "kept" not in record.scores:
        return False
    if record.config.get("repair"):
        return True
    try:
        return bool(getattr(catalogue.get(str(record.config.get("kind", "")), name).cls, "rewrites", False))
    except MoekitError:
        return True  # a method of another kind, or of another package


def _known(kind: str, name: str) -> bool:
    try:
        catalogue.get(kind, name)
    except MoekitError:
        return False
    return True


def _kept(child: Checkpoint, record: Record) -> dict[int, Sequence[int]]:
    kept = record.scores["kept"]
    found = _numbered(kept) if isinstance(kept, Mapping) else {}
    beyond = record.scores.get("kept_mtp")
    for prefix, experts in beyond.items() if isinstance(beyond, Mapping) else ():
        if (key := layer_key(child, prefix)) is not None:
            found[key] = experts
    return found


def _numbered(lists: Mapping[str, Sequence[int]]) -> dict[int, Sequence[int]]:
    return {int(layer): experts for layer, experts in lists.items() if str(layer).isdigit()}
