"""Can other software load it, and will it behave the same there?"""

from __future__ import annotations

from collections.abc import Iterator

from moekit.anatomy.layout import parse_expert_tensor
from moekit.checking.report import Finding
from moekit.checkpoint.expected import Layout
from moekit.checkpoint.experts import expert_counts
from moekit.checkpoint.folder import INDEX_FILE, Checkpoint
from moekit.checkpoint.record import TENSORS_FILE
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
        yield from _vllm(checkpoint, layout)


def _uneven(checkpoint: Checkpoint, target: str) -> Iterator[Finding]:
    counts = expert_counts(checkpoint.tensors)
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


def _vllm(checkpoint: Checkpoint, layout: Layout | None) -> Iterator[Finding]:
    if not checkpoint.config.get("architectures"):
        yield Finding(
            severity="error",
            code="no-architecture",
            message="the config names no architecture, by which vllm chooses the model class",
            file=str(checkpoint.path / "config.json"),
            hint='add "architectures" as save_pretrained writes it',
        )
    if (checkpoint.path / TENSORS_FILE).exists() and not (checkpoint.path / INDEX_FILE).exists():
        yield Finding(
            severity="error",
            code="extra-file-taken-for-weights",
            message=f"vllm loads every *.safetensors unless an index names the shards, so {TENSORS_FILE} too",
            file=str(checkpoint.path),
            hint="save it again with moekit, which writes an index then",
        )
    fused = [name for name in checkpoint.tensors if (found := parse_expert_tensor(name)) and found.expert is None]
    if layout is not None and fused and not all(name in layout.stock for name in fused):
        yield Finding(
            severity="warning",
            code="fused-experts",
            message="experts lie stacked under transformers' own names; vllm's loaders expect this family's split ones",
            file=str(checkpoint.path),
            hint="load and save it with moekit, which writes the split layout",
        )
    yield from _mixed_formats(checkpoint)


def _mixed_formats(checkpoint: Checkpoint) -> Iterator[Finding]:
    formats: dict[int, set[str]] = {}
    for name, info in checkpoint.tensors.items():
        found = parse_expert_tensor(name)
        if found is not None and found.suffix in {"", "weight"}:
            formats.setdefault(found.layer, set()).add(info.dtype)
    for layer, dtypes in formats.items():
        if len(dtypes) > 1:
            yield Finding(
                severity="error",
                code="mixed-formats",
                message=f"experts of one layer have different formats ({', '.join(sorted(dtypes))})",
                file=str(checkpoint.path),
                layer=layer,
                hint="vllm wants one format in a layer; mix between layers instead",
            )
