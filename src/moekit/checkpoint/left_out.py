"""Matrices of experts that shards leave out, because a runtime part beside them gives them.

Only `moekit.load` opens such a folder: it puts NaN in their place, so that nobody computes with what is not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.errors import BadCheckpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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


def is_nothing(tensor: Tensor) -> bool:
    """Whether a matrix is what `put_nothing` left in its place."""
    return tensor.dim() > 0 and not any(tensor.stride()) and tensor.numel() > 1


def put_nothing(
    model: nn.Module, empty: Iterable[str], layout: Layout, layers: frozenset[int], device: str | torch.device = "cpu"
) -> list[str]:
    """Give parameters that are left out NaN of their shape that takes no memory.

    Args:
        model: loaded, what has no weights on meta.
        empty: names of these.
        layout: of the model.
        layers: see `layers_left_out`.
        device: where the model goes: what is moved there later would take memory.

    Returns:
        Those that should have had weights.
    """
    import torch
    from torch import nn

    rest = []
    for name in empty:
        if not may_lack(name, layout, layers):
            rest.append(name)
            continue
        owner, _, leaf = name.rpartition(".")
        like = model.get_parameter(name)
        nothing = torch.full((), torch.nan, dtype=like.dtype, device=device).expand(like.shape)
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(nothing, requires_grad=False)
    return rest


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
