"""Finished layers of a streamed recording on disk, so that work which was interrupted goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moekit._files import read_text
from moekit.anatomy.probe import Geometry
from moekit.checkpoint.atomic import atomic_write
from moekit.trace.accumulator import LayerRecord
from moekit.trace.statistics import LayerStatistics

_PROGRESS = "progress.json"


def note(folder: Path, key: str, index: int, record: LayerRecord | None) -> None:
    """Note that a layer is finished.

    Args:
        folder: where.
        key: names the work: model, text and settings.
        index: decoder layer.
        record: what was recorded of it; None for nothing.
    """
    if record is not None:
        tensors = {f"statistics.{n}": t.contiguous() for n, t in record.statistics.items()}
        tensors |= {n: t for n in ("indices", "weights") if (t := getattr(record, n)) is not None}
        about = {"geometry": json.dumps(asdict(record.geometry)), "top_k": str(record.top_k)}
        save_file(tensors, folder / f"layer-{index}.safetensors", metadata=about)
    atomic_write(folder / _PROGRESS, json.dumps({"key": key, "done": index}))


def resume(folder: Path, key: str, domains: Sequence[str], tokens: int) -> tuple[int, dict[int, LayerRecord]]:
    """What an interrupted run of the same work finished.

    Args:
        folder: where it noted that.
        key: names the work.
        domains: of the text.
        tokens: of the text.

    Returns:
        The last layer it finished, -1 for none, and what it recorded of those up to it.
    """
    if not (folder / _PROGRESS).is_file():
        return -1, {}
    noted = json.loads(read_text(folder / _PROGRESS))
    if noted.get("key") != key:
        return -1, {}
    done = int(noted["done"])
    files = {index: folder / f"layer-{index}.safetensors" for index in range(done + 1)}
    return done, {index: _read(file, domains, tokens) for index, file in files.items() if file.is_file()}


def _read(file: Path, domains: Sequence[str], tokens: int) -> LayerRecord:
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    geometry = Geometry(**json.loads(about["geometry"]))
    tensors = load_file(file)
    values = {n.removeprefix("statistics."): t for n, t in tensors.items() if n.startswith("statistics.")}
    statistics = LayerStatistics(geometry.experts, geometry.hidden, domains, tokens, values, width=geometry.width)
    return LayerRecord(geometry, int(about["top_k"]), statistics, tensors.get("indices"), tensors.get("weights"))
