"""Matrices of experts that shards leave out, because a runtime part beside them gives them.

Only `moekit.load` opens such a folder: it puts NaN in their place, so that nobody computes with what is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.checkpoint.hollow import hollow_out
from moekit.checkpoint.uneven_loading import load_uneven
from moekit.errors import BadCheckpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moekit.checkpoint.expected import Differences
    from moekit.checkpoint.folder import Checkpoint
    from moekit.checkpoint.layout import Layout
    from moekit.checkpoint.record import Record


def layers_left_out(record: Record | None) -> frozenset[int]:
    """Decoder layers whose experts' matrices are not in the shards, as a record says."""
    parts = [] if record is None else record.parts
    return frozenset(layer for part in parts if part.replaces for layer in part.layers)


def may_lack(name: str, layout: Layout, layers: frozenset[int]) -> bool:
    """Whether a tensor may be missing on disk.

    Args:
        name: of the tensor, on disk or live.
        layout: of its model.
        layers: see `layers_left_out`.
    """
    return layout.layer(name) in layers and layout.is_expert(name) and not name.endswith("bias")


def settle(differences: Differences, checkpoint: Checkpoint, layout: Layout) -> Differences:
    """Take what is left out off the list of what is missing."""
    layers = layers_left_out(checkpoint.record)
    if layers:
        differences.missing = [name for name in differences.missing if not may_lack(name, layout, layers)]
    return differences


def load_left_out(
    checkpoint: Checkpoint, build: Callable[[torch.dtype | None], PreTrainedModel], dtype: str | torch.dtype
) -> tuple[PreTrainedModel, Iterable[str]]:
    """Load a checkpoint without the matrices that it leaves out, which take no memory and hold NaN.

    Args:
        checkpoint: opened and verified.
        build: see `load_uneven`.
        dtype: likewise.

    Returns:
        The model, and what should have had weights and did not get any.
    """
    model, empty = load_uneven(checkpoint, build, dtype)
    layers = layers_left_out(checkpoint.record)
    left_out = {name for name in empty if may_lack(name, checkpoint.layout, layers)}
    hollow_out(model, left_out)
    return model, [name for name in empty if name not in left_out]


def refuse_left_out(record: Record | None, file: Path) -> None:
    """Refuse a checkpoint whose shards alone are no model.

    Args:
        record: the checkpoint's.
        file: its folder, for the message.

    Raises:
        BadCheckpoint: shards leave out matrices of experts.
    """
    layers = layers_left_out(record)
    if layers:
        raise BadCheckpoint(
            "the shards leave out matrices of the experts, which a part beside them gives",
            file=file,
            layer=min(layers),
            hint='write whole ones first, in Python: moekit.save(moekit.load("...", parts=False), "whole")',
        )
