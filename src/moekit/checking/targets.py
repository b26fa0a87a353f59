"""Can other software load it, and will it behave the same there?"""

from __future__ import annotations

from collections.abc import Iterator

from moekit.checking.report import Finding
from moekit.checking.vllm import check_vllm
from moekit.checkpoint.experts import counts_of
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.layout import Layout
from moekit.errors import BadConfig

TARGETS = ("transformers", "vllm")


def check_target(checkpoint: Checkpoint, layout: Layout | None, target: str) -> Iterator[Finding]:
    """What keeps a target from loading the folder, or from running it as moekit does.

    Args:
        checkpoint: an opened folder.
        layout: what its config demands.
        target: "transformers" or "vllm".

    Raises:
        BadConfig: an unknown target.
    """
    if target not in TARGETS:
        raise BadConfig(f"there is nothing known of {target!r}", hint=f"choose {' or '.join(TARGETS)}")
    yield from _uneven(checkpoint, target)
    yield from _policy(checkpoint, target)
    if target == "vllm":
        yield from check_vllm(checkpoint, layout)


def _uneven(checkpoint: Checkpoint, target: str) -> Iterator[Finding]:
    counts = counts_of(checkpoint)
    if len(set(counts.values())) > 1:
        yield Finding(
            severity="error",
            code="uneven-experts",
            message=f"layers hold between {min(counts.values())} and {max(counts.values())} experts; {target} builds "
            "every layer with the same number",
            file=str(checkpoint.path),
            hint="use moekit.load, or prune all layers to one count",
        )


def _policy(checkpoint: Checkpoint, target: str) -> Iterator[Finding]:
    for part in checkpoint.record.parts if checkpoint.record else ():
        yield Finding(
            severity="warning",
            code="policy-ignored",
            message=f"{target} loads the weights, but runs the plain model without {part.kind} {part.name!r}",
            file=str(checkpoint.path),
            hint="use moekit.load, or evaluate the plain model before you serve it",
        )
