"""Does the folder hold together: files, index, names, shapes and dtypes against the config? No weight is read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.checking.report import Finding, from_error
from moekit.checkpoint.expected import Differences, compare, count_hint
from moekit.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint, read_weight_map
from moekit.checkpoint.layout import Layout, layout_of
from moekit.checkpoint.left_out import settle
from moekit.checkpoint.meta import meta_model
from moekit.checkpoint.names import text_config
from moekit.checkpoint.record import TENSORS_FILE
from moekit.checkpoint.safety import check_name, read_json
from moekit.errors import MoekitError, UnsafeInput, UnsupportedModel

_MAX_TOKENIZER_BYTES = 200_000_000


def open_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[Finding]]:
    """Open a folder; what keeps it from opening becomes a finding."""
    try:
        return Checkpoint.open(folder), []
    except UnsafeInput as error:
        return None, [from_error(error, "unsafe")]
    except MoekitError as error:
        stale = error.file is not None and error.file.endswith(INDEX_FILE)
        return None, [from_error(error, "stale-index" if stale else "unreadable")]


def build_layout(checkpoint: Checkpoint) -> tuple[Layout | None, list[MoELayer], list[Finding]]:
    """What the config demands, and its MoE layers; a config that no model can be built from becomes a finding."""
    try:
        model = meta_model(checkpoint)
        layout = layout_of(model)
    except MoekitError as error:
        return None, [], [from_error(error, "config")]
    try:
        return layout, find_moe_layers(model), []
    except UnsupportedModel:
        return layout, [], []  # a dense model can be checked too


def check_index(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Files that contradict the shards in use: a left-over index, left-over shards, a wrong total."""
    folder = checkpoint.path
    index = folder / INDEX_FILE
    single = checkpoint.shards == [SINGLE_FILE]
    if single and index.exists():
        yield from _left_over_index(checkpoint, index)
    used = {*checkpoint.shards, TENSORS_FILE}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in used:
            yield Finding(
                severity="warning",
                code="stray-shard",
                message="this file belongs to no index; loaders that take every *.safetensors would mix it in",
                file=str(path),
                hint="delete it if it is left over",
            )
    if not single and index.exists():
        total = (read_json(index, limit=100_000_000).get("metadata") or {}).get("total_size")
        if isinstance(total, int) and total != checkpoint.nbytes:
            yield Finding(
                severity="warning",
                code="index-total",
                message=f"the index says {total} bytes in all, the shards hold {checkpoint.nbytes}",
                file=str(index),
                hint="harmless to loaders; the index may be older than the shards",
            )


def _left_over_index(checkpoint: Checkpoint, index: Path) -> Iterator[Finding]:
    try:
        names = set(read_weight_map(index))
    except MoekitError as error:
        yield from_error(error, "stale-index")
        return
    same = names == set(checkpoint.tensors)
    yield Finding(
        severity="warning" if same else "error",
        code="stale-index",
        message=f"there is an index beside {SINGLE_FILE}"
        + ("" if same else f", and it names other tensors: {_few(sorted(names ^ set(checkpoint.tensors)))}"),
        file=str(index),
        hint="loaders differ in which of the two they believe: delete the stale one",
    )


def _few(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_layout(checkpoint: Checkpoint, layout: Layout) -> Iterator[Finding]:
    """Names, shapes and dtypes against the config, one finding for each expert or tensor."""
    differences = settle(compare(checkpoint.tensors, layout, checkpoint.config), checkpoint, layout)
    if not differences:
        return
    hint = count_hint(differences, checkpoint.config, checkpoint.tensors)
    if hint:
        yield Finding(
            severity="error",
            code="expert-count",
            message=hint,
            file=str(checkpoint.path / "config.json"),
            hint="correct the config, or fetch the shards that belong to it",
        )
    yield from _missing_and_surplus(checkpoint, differences)
    yield from _shapes_and_dtypes(checkpoint, differences)


def _by_expert(checkpoint: Checkpoint, names: list[str]) -> Iterator[tuple[int | None, int | None, list[str]]]:
    groups: dict[tuple[int | None, int | None, str], list[str]] = defaultdict(list)
    for name in names:
        layer, expert = checkpoint.where(name)
        groups[layer, expert, "" if expert is not None else name].append(name)
    for (layer, expert, _), members in groups.items():
        yield layer, expert, members


def _missing_and_surplus(checkpoint: Checkpoint, differences: Differences) -> Iterator[Finding]:
    for layer, expert, names in _by_expert(checkpoint, differences.missing):
        whole = expert is not None and not _has_expert(checkpoint, layer, expert)
        yield Finding(
            severity="error",
            code="missing-expert" if whole else "missing-tensor",
            message=f"the config demands {_few(names)}, which {'is' if len(names) == 1 else 'are'} missing",
            file=str(checkpoint.path),
            layer=layer,
            expert=expert,
            hint="fetch the shards again, or make the checkpoint again from its parent",
        )
    for layer, expert, names in _by_expert(checkpoint, differences.surplus):
        yield Finding(
            severity="error",
            code="surplus-expert" if expert is not None else "surplus-tensor",
            message=f"the config knows nothing of {_few(names)}",
            file=str(checkpoint.path / checkpoint.tensors[names[0]].shard),
            layer=layer,
            expert=expert,
            hint="a shard of another model, or a config of another one",
        )


def _has_expert(checkpoint: Checkpoint, layer: int | None, expert: int) -> bool:
    return any(checkpoint.where(name) == (layer, expert) for name in checkpoint.tensors)


def _shapes_and_dtypes(checkpoint: Checkpoint, differences: Differences) -> Iterator[Finding]:
    for name, expected in differences.shapes.items():
        info = checkpoint.tensors[name]
        layer, expert = checkpoint.where(name)
        transposed = len(expected) >= 2 and info.shape == (*expected[:-2], expected[-1], expected[-2])
        yield Finding(
            severity="error",
            code="transposed" if transposed else "shape",
            message=f"{name} is {list(info.shape)} instead of {list(expected)}"
            + (": transposed" if transposed else ""),
            file=str(checkpoint.path / info.shard),
            layer=layer,
            expert=expert,
            hint="convert the checkpoint again with the right orientation" if transposed else None,
        )
    for name, why in differences.dtypes.items():
        layer, expert = checkpoint.where(name)
        yield _dtype(checkpoint, name, f"{name} is {why}", layer, expert)


def _dtype(checkpoint: Checkpoint, name: str, message: str, layer: int | None, expert: int | None) -> Finding:
    return Finding(
        severity="error",
        code="dtype",
        message=message,
        file=str(checkpoint.path / checkpoint.tensors[name].shard),
        layer=layer,
        expert=expert,
        hint="cast it on purpose, or make the checkpoint again",
    )


def check_dtypes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tensors of one kind share a dtype over all layers and experts, unless the checkpoint is quantized."""
    if "quantization_config" in checkpoint.config:
        return
    kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, info in checkpoint.tensors.items():
        kinds[re.sub(r"\.\d+\.", ".#.", name)][info.dtype].append(name)
    for by_dtype in kinds.values():
        common = max(by_dtype, key=lambda dtype: len(by_dtype[dtype]))
        for dtype, names in by_dtype.items():
            for name in names if dtype != common else ():
                layer, expert = checkpoint.where(name)
                yield _dtype(checkpoint, name, f"{name} is {dtype}, all its peers are {common}", layer, expert)


def check_tokenizer_file(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The ids of tokenizer.json against the embedding."""
    path = check_name(checkpoint.path, "tokenizer.json")
    rows = text_config(checkpoint.config).get("vocab_size")
    if not path.exists() or not isinstance(rows, int):
        return
    try:
        content = read_json(path, limit=_MAX_TOKENIZER_BYTES)
    except MoekitError as error:
        yield from_error(error, "tokenizer")
        return
    largest = _largest_id(content)
    if largest >= rows:
        yield Finding(
            severity="error",
            code="tokenizer",
            message=f"the tokenizer produces ids up to {largest}, but the embedding has {rows} rows",
            file=str(path),
            hint="put the model's own tokenizer there, or resize the embedding and train it",
        )


def _largest_id(tokenizer: dict[str, Any]) -> int:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary or []) - 1]
    ids += [token.get("id") for token in tokenizer.get("added_tokens") or [] if isinstance(token, dict)]
    return max((value for value in ids if isinstance(value, int)), default=-1)
