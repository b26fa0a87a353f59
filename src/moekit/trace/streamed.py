"""Record a checkpoint layer by layer, straight from disk: the model never lies in memory as a whole.

All of the text passes through one decoder layer, its statistics are taken, its weights leave memory, and the states go
on to the next. Work that is interrupted goes on at the layer it had come to.

Legend: B rows, S positions, N tokens, K choices a token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from moekit._progress import Progress, track
from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.anatomy.swap import replaced
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import ancestors
from moekit.data import vocabulary
from moekit.errors import BadData, UnsupportedModel
from moekit.runtime.watching import refuse_unseen
from moekit.streaming.loader import LayerLoader
from moekit.streaming.passes import Passes
from moekit.streaming.states import MEMORY_BYTES
from moekit.streaming.walk import Inputs, Walk
from moekit.trace.accumulator import LabelAccumulator, LayerAccumulator, LayerRecord, LayerRecording
from moekit.trace.assembly import assemble
from moekit.trace.expert_inputs import ExpertInputs
from moekit.trace.layer_hook import LayerHook
from moekit.trace.meta import STOCK_ROUTING, tokenizer_hash
from moekit.trace.recording import Recording
from moekit.trace.resuming import note, resume
from moekit.trace.rows import RowCounter, read_batch, rows_of_pass
from moekit.trace.sources.base import ForwardPass, Place, Removable
from moekit.trace.sources.places import dense_place, moe_place
from moekit.trace.statistics import LayerStatistics
from moekit.trace.store import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class Looker(Protocol):
    """Looks at MoE layers pass by pass, beside the statistics."""

    def watching(self, place: Place) -> contextlib.AbstractContextManager[None]:
        """For as long as the text passes through a layer."""

    def take(self, current: ForwardPass) -> None:
        """A pass has run through it."""


# (layer with its weights, what was recorded of it) -> the block that the text goes on through
Change = Callable[[MoELayer, LayerStatistics], nn.Module | None]


class Streamed:
    """A text on its way through a checkpoint, one layer in memory at a time, and the books of what was seen.

    Args:
        checkpoint: opened and verified.
        batches: as `moekit.trace.record` takes them.
        statistics: names or groups of the vocabulary.
        keep_choices: keep each token's choices.
        weights: keep their gate weights too.
        folder: where states and finished layers are kept, so that a run that was interrupted goes on; None for memory.
        limit: bytes of states kept in memory where no folder is given.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.
        keep_inputs: keep what a layer's experts are given until the next layer, so that a change may go through it.
        config: of the model, where it is not the checkpoint's own.

    Attributes:
        looker: looks at each MoE layer as well, pass by pass; none unless it is set.
        inputs: of the experts of the layer that has just run, where kept: each expert's second moments, for example.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Iterable[Any],
        *,
        statistics: Iterable[str] = ("basic",),
        keep_choices: bool = False,
        weights: bool = False,
        folder: str | Path | None = None,
        limit: int = MEMORY_BYTES,
        dtype: torch.dtype | None = None,
        device: str = "auto",
        keep_inputs: bool = False,
        config: PreTrainedConfig | None = None,
    ) -> None:
        recording = self.asked = Recording(statistics=statistics, keep_choices=keep_choices, weights=weights)
        if recording.whole_model:
            raise UnsupportedModel(
                f"these statistics cannot be taken layer by layer: {recording.whole_model}",
                file=checkpoint.path,
                hint="record the whole model first (moekit profile MODEL --data TEXT -o TRACE), then decide on that "
                "(--trace TRACE); in Python moekit.trace.record",
            )
        self.checkpoint = checkpoint
        self.entries = recording.entries
        self.keep_weights, self.keep_choices = recording.keeps_weights, recording.keeps_choices
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.counter = RowCounter()
        self.labels = LabelAccumulator(keep=self.keep_choices)
        inputs, passes, digests = [], [], list[str]()
        for batch in batches:
            ids_BS, labels = read_batch(batch)
            if not ids_BS.numel() or not bool(labels.mask_BS.any()):
                continue
            rows = rows_of_pass(self.counter, {"input_ids": ids_BS}, labels)
            shown = getattr(batch, "shown", None)
            digests.append("" if shown is None else shown.digest)
            inputs.append(Inputs(ids_BS, labels.mask_BS.long(), None if shown is None else shown.features))
            passes.append(rows)
        if not inputs:
            raise BadData("the text holds no tokens but padding", hint="give a text that is not empty")
        self._shown = digests
        self.domains = list(self.counter.domains)
        self.passes = [ForwardPass(rows, self.domains) for rows in passes]
        for current in self.passes:
            self.labels.add(current.labels)
        self.labels.flush()
        self.loader = LayerLoader(checkpoint, dtype=dtype, device=device, config=config)
        if recording.routed:
            for layer in find_moe_layers(self.loader.model):
                refuse_unseen(layer, checkpoint.path)
        for batch in inputs:
            vocabulary.check(batch.input_ids, vocabulary.embedding_rows(self.loader.model))
        self.walk = Walk(self.loader, inputs, folder=self.folder, limit=limit)
        self.records: dict[int, LayerRecord] = {}
        self.looker: Looker | None = None
        self._limit = limit
        self._under_way: Passes | None = None
        self.inputs = self._expert_inputs("expert-inputs") if keep_inputs else None

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()

    @property
    def tokens(self) -> int:
        """Tokens of the text, padding not counted."""
        return self.labels.tokens

    def run(
        self,
        progress: Progress | None = None,
        change: Change | None = None,
        then: Callable[[Passes], None] | None = None,
    ) -> None:
        """Take all layers' statistics.

        Args:
            progress: told layer by layer.
            change: given each MoE layer with its weights and what was recorded of it, makes the block that the text
                passes through to the next layer instead; None lets it pass through the layer as it is.
            then: given the passes behind the last layer.
        """
        key = self._key()
        passes = self._under_way = self.walk.passes("states", resumed=True)
        try:
            done = passes.begin_loaded(self._resume(key))
            if done < 0:
                self.records.clear()
            for index in track(range(done + 1, self.loader.layers), "calibrating", progress):
                self._layer(index, passes, change)
                passes.seal(index)
                if self.folder is not None:
                    note(self.folder, key, index, self.records.get(index))
            if then is not None:
                then(passes)
        finally:
            passes.close()
        if self.inputs is not None:
            self.inputs.close()

    def _layer(self, index: int, passes: Passes, change: Change | None) -> None:
        with self.loader.loaded(index):
            moe = self.walk.moe(index)
            place = None
            if moe is not None:
                place = moe_place(self.loader.model, moe)
            elif not self.asked.routed:
                place = dense_place(self.loader.model, index, self.loader.layer(index))
            recording = contextlib.nullcontext(None) if place is None else self.recording_at(place)
            watching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if moe is not None and self.inputs is not None:
                watching = self.inputs.watching(moe)
            looker = None if moe is None else self.looker
            looking: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if looker is not None and place is not None:
                looking = looker.watching(place)
            with torch.no_grad(), recording as layer, watching, looking:
                for number, current in enumerate(self.passes):
                    if layer is not None:
                        layer.hook.begin(current)
                    passes.run(index, number)
                    if layer is not None:
                        layer.take(current, self.domains)
                    if looker is not None:
                        looker.take(current)
                    if change is None:
                        passes.go_on(index, number)
            if layer is not None:
                self.records[index] = layer.accumulator.record(self.domains)
            if change is not None:
                block = None if moe is None else change(moe, self.records[index].statistics)
                self._go_on(index, passes, moe, block)

    def _go_on(self, index: int, passes: Passes, moe: MoELayer | None, block: nn.Module | None) -> None:
        """Let the text go on to the next layer, through another block where there is one."""
        with contextlib.nullcontext() if moe is None else replaced(self.loader.model, moe.name, block):
            for number in range(len(self.passes)):
                if block is not None:
                    passes.run(index, number)
                passes.go_on(index, number)

    def _expert_inputs(self, name: str) -> ExpertInputs:
        hidden, kind = self.walk.hidden, self.loader.dtype
        return ExpertInputs(self.passes, hidden, kind, folder=self.folder, name=name, limit=self._limit)

    @contextlib.contextmanager
    def inputs_of(self, moe: MoELayer, block: nn.Module) -> Iterator[ExpertInputs]:
        """What the experts of another block are given where a layer stands; the text goes on as it would have.

        For a change that `run` asks for, which has just been given this layer.

        Args:
            moe: the layer, which must be loaded.
            block: what is tried in its place.
        """
        passes = self._under_way
        assert passes is not None  # asked for while the text stands at the layer
        further = self._expert_inputs("further-inputs")
        try:
            with replaced(self.loader.model, moe.name, block):
                other = self.walk.moe(moe.index)
                assert other is not None
                with further.watching(other):
                    for number in range(len(self.passes)):
                        answered = passes.get(number).clone()
                        passes.run(moe.index, number)
                        passes.put(number, answered)
                yield further
        finally:
            further.close()

    def recording(self, moe: MoELayer) -> contextlib.AbstractContextManager[LayerRecording]:
        """See a loaded MoE layer for as long as the block lasts."""
        return self.recording_at(moe_place(self.loader.model, moe))

    @contextlib.contextmanager
    def recording_at(self, place: Place) -> Iterator[LayerRecording]:
        """See a loaded layer for as long as the block lasts."""
        hook = LayerHook(place, self.asked.early, once=True)
        accumulator = LayerAccumulator(
            place, self.entries, keep_choices=self.keep_choices, keep_weights=self.keep_weights
        )
        handles: list[Removable] = []
        try:
            handles.extend(hook.hooks())
            yield LayerRecording(place, hook, accumulator)
        finally:
            hook.begin(None)
            for handle in handles:
                handle.remove()

    def trace(
        self, *, tokenizer: PreTrainedTokenizerBase | None = None, source: str = "", seed: int | None = None
    ) -> Trace:
        """What was recorded.

        Raises:
            UnsupportedModel: the model has no MoE layer.
        """
        if not self.records:
            raise UnsupportedModel(
                f"{type(self.loader.model).__name__} is not a Mixture of Experts", file=self.checkpoint.path
            )
        told = {
            "model": str(self.checkpoint.path),
            "fingerprint": self.checkpoint.fingerprint,
            "ancestors": ancestors(self.checkpoint.record),
            "routing": STOCK_ROUTING,
            "tokenizer": tokenizer_hash(tokenizer) if tokenizer is not None else "",
            "seed": seed,
        }
        names = [entry.name for entry in self.entries]
        begins = self.counter.begins
        return assemble(self.records, self.labels, self.domains, names=names, source=source, begins=begins, told=told)

    def _key(self) -> str:
        digest = hashlib.sha256(self.checkpoint.fingerprint.encode())
        settings = [[e.name for e in self.entries], self.keep_choices, self.keep_weights, str(self.loader.dtype)]
        digest.update(json.dumps(settings).encode())
        digest.update(self.loader.model.config.to_json_string(use_diff=False).encode())
        for batch in self.walk.batches:
            digest.update(json.dumps(list(batch.input_ids.shape)).encode())
            digest.update(batch.input_ids.numpy().tobytes())
            digest.update(batch.attention_mask.numpy().tobytes())
        digest.update(json.dumps([list(self.domains), *([self._shown] if any(self._shown) else [])]).encode())
        for current in self.passes:
            digest.update(current.labels.domain_N.numpy().tobytes())
        return digest.hexdigest()

    def _resume(self, key: str) -> int:
        """The last layer that an interrupted run of the same work finished, its records read; -1 for none."""
        if self.folder is None:
            return -1
        done, self.records = resume(self.folder, key, self.domains, self.tokens)
        return done


def record_streamed(
    checkpoint: Checkpoint,
    batches: Iterable[Any],
    *,
    statistics: Iterable[str] = ("basic",),
    keep_choices: bool = False,
    weights: bool = False,
    folder: str | Path | None = None,
    limit: int = MEMORY_BYTES,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str = "",
    seed: int | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Record what a checkpoint's routers choose and its experts do, in the memory of a few layers.

    Arguments as in `Streamed` and `moekit.trace.record`.

    Raises:
        BadData: the batches hold no tokens but padding.
        BadConfig: an unknown statistic, or a token id the model does not embed.
        NumericFault: NaN or infinity in a router, with its layer.
        UnsupportedModel: no MoE, weights quantized in a way that is not read here, or a statistic that reads what this
            family does not show.
    """
    with Streamed(
        checkpoint,
        batches,
        statistics=statistics,
        keep_choices=keep_choices,
        weights=weights,
        folder=folder,
        limit=limit,
        dtype=dtype,
        device=device,
    ) as streamed:
        streamed.run(progress)
        return streamed.trace(tokenizer=tokenizer, source=source, seed=seed)
