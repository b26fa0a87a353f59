"""Statistics of several texts, each on its own, out of one pass through a checkpoint that lies on disk.

Every layer is read once, all texts go through it, and its weights leave memory: what an expert set for each task needs,
and what a prompt is scored by, for which the first layers are enough. Work that is interrupted goes on at the layer it
had come to.

Legend: B rows, S positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moekit._files import read_text
from moekit._progress import Progress, track
from moekit.anatomy.probe import Geometry, MoELayer, find_moe_layers
from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.folder import Checkpoint
from moekit.errors import BadConfig, BadData
from moekit.streaming.passes import Passes
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Streamed

_PROGRESS = "progress.json"


class GroupedText:
    """Several texts on their way through a checkpoint, one layer in memory at a time.

    Args:
        checkpoint: opened and verified.
        texts: name -> batches, as `moekit.trace.record` takes them.
        statistics: names of the vocabulary.
        layers: MoE layers to come to, counted from the first; None for all.
        folder: where states and finished layers are kept, so that a run that was interrupted goes on; None for memory.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.

    Attributes:
        statistics: of each text: decoder layer -> statistics; filled by `run`.
        geometries: decoder layer -> sizes of its MoE block, of all layers.

    Raises:
        BadData: a text without tokens.
        BadConfig: more layers than there are, or a token id that the model does not embed.
        UnsupportedModel: weights quantized in a way that is not read here, or no MoE.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: Mapping[str, Iterable[Any]],
        *,
        statistics: Iterable[str],
        layers: int | None = None,
        folder: Path | None = None,
        dtype: torch.dtype | None = None,
        device: str = "auto",
    ) -> None:
        batches = {name: list(text) for name, text in texts.items()}
        flat = [batch for text in batches.values() for batch in text]
        needed = tuple(dict.fromkeys(statistics))
        self._streamed = Streamed(checkpoint, flat, statistics=needed, folder=folder, dtype=dtype, device=device)
        if len(self._streamed.passes) != len(flat) or not all(batches.values()):
            raise BadData("a text holds no tokens, or a batch of padding only", hint="leave empty texts out")
        ends = torch.tensor([len(text) for text in batches.values()]).cumsum(0).tolist()
        self._members = {
            name: range(end - len(text), end) for (name, text), end in zip(batches.items(), ends, strict=True)
        }
        self.geometries = {layer.index: layer.geometry for layer in find_moe_layers(self._streamed.loader.model)}
        count = len(self.geometries) if layers is None else layers
        if not 1 <= count <= len(self.geometries):
            raise BadConfig(
                f"{count} layers, but the model has {len(self.geometries)} MoE layers",
                file=checkpoint.path,
                hint=f"ask for 1 to {len(self.geometries)}",
            )
        self._last = sorted(self.geometries)[count - 1]
        self._folder = folder
        self.statistics: dict[str, dict[int, LayerStatistics]] = {name: {} for name in batches}

    def run(self, progress: Progress | None = None) -> dict[str, dict[int, LayerStatistics]]:
        """Take the statistics of every text.

        Args:
            progress: told layer by layer.

        Returns:
            name -> decoder layer -> statistics.

        Raises:
            NumericFault: NaN or infinity in a router, with its layer.
        """
        key = self._key()
        passes = self._streamed.walk.passes("states", resumed=True)
        try:
            done = passes.begin_loaded(self._resume(key))
            for index in track(range(done + 1, self._last + 1), "reading the text", progress):
                self._layer(index, passes)
                passes.seal(index)
                self._note(key, index)
        finally:
            passes.close()
            self._streamed.loader.close()
        return self.statistics

    @torch.no_grad()
    def _layer(self, index: int, passes: Passes) -> None:
        with self._streamed.loader.loaded(index):
            moe = self._streamed.walk.moe(index)
            for name, members in self._members.items():
                if moe is not None:
                    self.statistics[name][index] = self._record(moe, members, passes)
                    continue
                for number in members:
                    passes.run(index, number)
                    passes.go_on(index, number)

    def _record(self, moe: MoELayer, members: Iterable[int], passes: Passes) -> LayerStatistics:
        """Let one text through a loaded layer, and count."""
        streamed = self._streamed
        with streamed.recording(moe) as layer:
            for number in members:
                current = streamed.passes[number]
                layer.hook.begin(current)
                passes.run(moe.index, number)
                layer.take(current, streamed.domains)
                passes.go_on(moe.index, number)
        return layer.accumulator.record(streamed.domains).statistics

    def _key(self) -> str:
        streamed = self._streamed
        told = [[e.name for e in streamed.entries], str(streamed.loader.dtype), streamed.domains, self._last]
        members = {name: [span.start, span.stop] for name, span in self._members.items()}
        digest = hashlib.sha256(streamed.checkpoint.fingerprint.encode())
        digest.update(json.dumps([*told, members]).encode())
        for batch, current in zip(streamed.walk.batches, streamed.passes, strict=True):
            digest.update(repr(tuple(batch.input_ids.shape)).encode())
            for tensor in (batch.input_ids, batch.attention_mask, current.labels.domain_N):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _note(self, key: str, index: int) -> None:
        if self._folder is None:
            return
        if index in self.geometries:
            tensors = {
                f"{number}.{statistic}": tensor.contiguous()
                for number, found in enumerate(self.statistics.values())
                for statistic, tensor in found[index].items()
            }
            counts = [found[index].tokens for found in self.statistics.values()]
            save_file(tensors, self._folder / f"texts-{index}.safetensors", metadata={"tokens": json.dumps(counts)})
        atomic_write(self._folder / _PROGRESS, json.dumps({"key": key, "done": index}))

    def _resume(self, key: str) -> int:
        """The last layer that an interrupted run of the same work finished, its statistics read; -1 for none."""
        if self._folder is None or not (self._folder / _PROGRESS).is_file():
            return -1
        noted = json.loads(read_text(self._folder / _PROGRESS))
        if noted.get("key") != key:
            return -1
        done = int(noted["done"])
        for index, geometry in self.geometries.items():
            if index <= done:
                self._read(index, geometry, self._folder / f"texts-{index}.safetensors")
        return done

    def _read(self, index: int, geometry: Geometry, file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            counts = json.loads(opened.metadata()["tokens"])
        tensors = load_file(file)
        for number, (found, tokens) in enumerate(zip(self.statistics.values(), counts, strict=True)):
            head = f"{number}."
            values = {name.removeprefix(head): t for name, t in tensors.items() if name.startswith(head)}
            found[index] = LayerStatistics(
                geometry.experts, geometry.hidden, self._streamed.domains, tokens, values, width=geometry.width
            )
