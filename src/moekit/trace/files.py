"""Traces on disk: a folder of `trace.json`, which a person can read, and `trace.safetensors`."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from moekit._validation import parse_file
from moekit.checkpoint.atomic import atomic_folder
from moekit.checkpoint.safety import TensorInfo, load_tensors, read_header
from moekit.errors import BadCheckpoint, BadData
from moekit.trace.data import AnyTrace, TraceData
from moekit.trace.meta import TraceMeta, index_dtype
from moekit.trace.statistics import LayerStatistics, Statistics
from moekit.trace.tokens import RUN_DTYPES, TokenLabels
from moekit.trace.vocabulary import get

META_FILE = "trace.json"
TENSORS_FILE = "trace.safetensors"
MAX_META_BYTES = 16 << 20
_AGAIN = "record the trace again, or copy the whole folder"


def save(trace: TraceData, folder: Path, *, overwrite: bool) -> None:
    """See `Trace.save`."""
    tensors = {name: tensor.contiguous() for name, tensor in trace.tensors().items()}
    need = sum(t.numel() * t.element_size() for t in tensors.values()) + (1 << 16)
    with atomic_folder(folder, overwrite=overwrite, need_bytes=need) as temporary:
        (temporary / META_FILE).write_text(trace.meta.model_dump_json(indent=2) + "\n")
        safetensors.torch.save_file(tensors, temporary / TENSORS_FILE)


def read_meta(folder: Path) -> TraceMeta:
    """The readable part of a trace.

    Raises:
        BadData: not a trace, or damaged.
    """
    file = folder / META_FILE
    missing = "`moekit profile` records one"
    return parse_file(TraceMeta, file, what="trace", missing=missing, hint=_AGAIN, limit=MAX_META_BYTES)


_KINDS = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32"}


def _expected(meta: TraceMeta) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Dtype and shape of each tensor a trace of this description holds; None for a list whose length is open."""
    names: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for layer, experts, top_k in zip(meta.layers, meta.experts, meta.top_k, strict=True):
        if meta.has_choices:
            names[f"layers.{layer}.indices"] = (_KINDS[index_dtype(experts)], (meta.tokens, top_k))
        if meta.has_weights:
            names[f"layers.{layer}.weights"] = ("F16", (meta.tokens, top_k))
        blank = LayerStatistics(experts, meta.hidden, meta.domains, width=meta.width_of(layer))
        for name in meta.statistics:
            entry = get(name)
            names[f"statistics.{layer}.{name}"] = ("I64" if entry.integer else "F64", blank.shape(entry))
    if meta.has_choices:
        names |= {f"run_{name}": (_KINDS[dtype], None) for name, dtype in RUN_DTYPES.items()}
    return names


def _check_header(meta: TraceMeta, found: dict[str, TensorInfo], file: Path) -> None:
    expected = _expected(meta)
    if missing := sorted(set(expected) - set(found)):
        raise BadData(f"damaged trace: tensors are missing: {', '.join(missing)}", file=file, hint=_AGAIN)
    if strange := sorted(set(found) - set(expected)):
        raise BadData(f"damaged trace: tensors nobody described: {', '.join(strange)}", file=file, hint=_AGAIN)
    for name, (kind, shape) in expected.items():
        info = found[name]
        fits = len(info.shape) == 1 if shape is None else info.shape == shape
        if info.dtype != kind or not fits:
            wanted = f"{kind} {'[number of runs]' if shape is None else list(shape)}"
            raise BadData(
                f"damaged trace: {name} is {info.dtype} {list(info.shape)}, not {wanted}", file=file, hint=_AGAIN
            )


def load(folder: Path, kind: type[AnyTrace]) -> AnyTrace:
    """See `Trace.load`; what is made is of the class `kind`."""
    meta = read_meta(folder)
    file = folder / TENSORS_FILE
    try:
        header = read_header(file)
    except BadCheckpoint as error:
        raise BadData(f"damaged trace: {error.message}", file=file, hint=_AGAIN) from error
    _check_header(meta, dict(header.tensors), file)
    try:
        tensors = load_tensors(file)
    except BadCheckpoint as error:
        raise BadData(f"damaged trace: {error.message}", file=file, hint=_AGAIN) from error
    labels = TokenLabels.decode(tensors, meta.tokens) if meta.has_choices else None
    indices = {layer: tensors[f"layers.{layer}.indices"] for layer in meta.layers if meta.has_choices}
    weights = {layer: tensors[f"layers.{layer}.weights"] for layer in meta.layers if meta.has_weights}
    for layer, chosen in indices.items():
        _check_range(chosen, meta.experts_of(layer), layer, file)
    if labels is not None and len(labels):
        _check_range(labels.domain_N, len(meta.domains) - 1, None, file)
    statistics = _statistics(meta, tensors) if meta.statistics else None
    return kind(meta, labels, indices, weights, statistics)


def _check_range(numbers: Tensor, largest: int, layer: int | None, file: Path) -> None:
    if numbers.numel() and (int(numbers.min()) < 0 or int(numbers.max()) > largest):
        what = "experts" if layer is not None else "domains"
        raise BadData(f"damaged trace: {what} outside 0..{largest}", file=file, layer=layer, hint=_AGAIN)


def _statistics(meta: TraceMeta, tensors: dict[str, Tensor]) -> Statistics:
    layers = {}
    for layer, experts in zip(meta.layers, meta.experts, strict=True):
        values = {name: tensors[f"statistics.{layer}.{name}"] for name in meta.statistics}
        width = meta.width_of(layer)
        layers[layer] = LayerStatistics(experts, meta.hidden, meta.domains, meta.tokens, values, width=width)
    return Statistics(layers)
