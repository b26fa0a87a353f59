"""Record what the routers of a live model choose, with statistics, at little more than the cost of the forward pass.

A recorder keeps what each pass showed on the model's device and adds it up every few thousand tokens, so that nothing
waits for the device while a pass runs. A pass that fails half-way leaves nothing behind.

Legend: B rows, S positions.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.anatomy.probe import holds_all_experts
from moekit.checkpoint.fingerprint import fingerprint_model, provenance_of
from moekit.checkpoint.record import ancestors
from moekit.checkpoint.several import writer_of
from moekit.errors import BadConfig, BadData, MoekitError, UnsupportedModel
from moekit.trace.accumulator import LabelAccumulator, LayerAccumulator
from moekit.trace.assembly import assemble
from moekit.trace.layer_hook import LayerHook
from moekit.trace.meta import tokenizer_hash
from moekit.trace.recording import Recording, RecordingOptions
from moekit.trace.rows import Labels, RowCounter, RowSource, read_batch, rows_of_pass
from moekit.trace.seam import refuse_compiled, routing_of
from moekit.trace.sources.base import ForwardPass, Removable
from moekit.trace.sources.gradients import differentiate
from moekit.trace.sources.places import recorded_places
from moekit.trace.store import Trace


class Recorder:
    """Records every forward pass of a model while it is entered.

    Use `record` for a text; use this where you run the passes yourself::

        with Recorder(model, statistics=("load", "gate_mass")) as recorder:
            for batch in batches:
                recorder.expect(batch)  # documents and domains; without it each row is a document
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        trace = recorder.trace()

    Padding is read from the pass's 2-D `attention_mask`. Passes that continue a key-value cache continue their
    sequences.

    Args:
        model: a MoE; eager, not compiled.
        recording: what to keep.
        options: the fields of `Recording`, where no `recording` is given.

    Raises:
        BadConfig: an unknown statistic or layer.
        UnsupportedModel: no MoE, compiled, or a statistic reads what this family does not show.
    """

    _records = True

    def __init__(
        self,
        model: nn.Module,
        recording: Recording | None = None,
        **options: Unpack[RecordingOptions],
    ) -> None:
        refuse_compiled(model)
        recording = self.recording = Recording(**options) if recording is None else recording
        self.model = model
        self.counter = RowCounter()
        self._entries = recording.entries
        self._places = recorded_places(model, recording.layers, routed=recording.routed)
        self._hooks = [LayerHook(place, recording.early, once=recording.once) for place in self._places]
        self._accumulators = [
            LayerAccumulator(
                place, self._entries, keep_choices=recording.keeps_choices, keep_weights=recording.keeps_weights
            )
            for place in self._places
        ]
        self._labels = LabelAccumulator(keep=recording.keeps_choices)
        fingerprint, tokenizer = recording.fingerprint, recording.tokenizer
        if fingerprint is None:
            fingerprint = fingerprint_model(model) if isinstance(model, PreTrainedModel) else ""
        self._told = {
            "model": str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__),
            "fingerprint": fingerprint,
            "ancestors": ancestors(getattr(provenance_of(model), "record", None)),
            "routing": routing_of([place.moe for place in self._places if place.moe is not None]),
            "tokenizer": tokenizer_hash(tokenizer) if tokenizer is not None else "",
            "seed": recording.seed,
        }
        self._names = list(inspect.signature(model.forward).parameters)
        self._expected: Labels | None = None
        self._row_source: RowSource | None = None
        self._pass: ForwardPass | None = None
        self._gradients = [hook.gradients for hook in self._hooks if hook.gradients is not None]
        self._held: ForwardPass | None = None
        self._fault: MoekitError | None = None
        self._handles: list[Removable] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        """One that does nothing: it comes along with a copy of the model, which nobody records."""
        made = object.__new__(type(self))
        made._records, made._pass = False, None
        return made

    def __enter__(self) -> Recorder:
        if self._handles:
            raise BadConfig("this recorder is entered already", hint="use one `with` at a time")
        try:
            self._install()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _install(self) -> None:
        # `generate` calls a whole's part that writes; so does the whole.
        runs = writer_of(self.model) if isinstance(self.model, PreTrainedModel) else self.model
        self._handles.append(runs.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(runs.register_forward_hook(self._end))
        for hook in self._hooks:
            self._handles.extend(hook.hooks())
        if self._gradients:
            # So that there is a way back from the loss even where no parameter learns.
            embedding = self.model.get_input_embeddings()  # type: ignore[operator]
            self._handles.append(embedding.register_forward_hook(_learns))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        self._pass, self._held = None, None
        for hook in self._hooks:
            hook.begin(None)

    def expect(self, batch: Any) -> None:
        """Say which documents and domains the next pass holds.

        Args:
            batch: a `moekit.data.Batch`, a mapping with "input_ids" and "attention_mask", or a tensor of ids.
        """
        self._expected = batch if isinstance(batch, Labels) else read_batch(batch)[1]

    def label_by(self, rows: RowSource | None) -> None:
        """Let a function label every pass, until None is given."""
        self._row_source = rows

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._records:
            return
        if torch.compiler.is_compiling():
            raise UnsupportedModel("the model is compiled while it is recorded", hint="record it without torch.compile")
        if self._held is not None:
            raise BadConfig(
                "the pass before waits for its gradients", hint="call recorder.backward(loss) after each forward pass"
            )
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        if self._row_source is not None:
            rows = self._row_source(arguments)
        else:
            expected, self._expected = self._expected, None
            # Nothing is numbered for what stands for a batch of no rows (`moekit.parallel.empty_batch`).
            counter = RowCounter() if _stands_for_nothing(arguments, expected) else self.counter
            rows = rows_of_pass(counter, arguments, expected if counter is self.counter else None)
        self._pass = ForwardPass(rows, self.counter.domains)
        for hook in self._hooks:
            hook.begin(self._pass)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        current = self._pass
        if current is None:
            return
        if self._gradients and current.tokens:
            self._held, self._pass = current, None
            return
        self._finish(current)

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss of the pass that just ran, where statistics read gradients; no `grad` is touched.

        Args:
            loss: one number, made from the output of the pass; a sum over tokens, so that passes add up.

        Raises:
            BadConfig: no pass waits for it.
            UnsupportedModel: the pass ran without gradients, or the loss does not depend on it.
        """
        current = self._held
        if current is None:
            raise BadConfig(
                "no forward pass waits for gradients",
                hint="name a statistic of gradients, and call this once after each forward pass",
            )
        try:
            differentiate(loss, self._gradients)
            for hook in self._hooks:
                hook.measure()
        except BaseException:
            self._forget()
            raise
        self._finish(current)

    def _finish(self, current: ForwardPass) -> None:
        buffers = [hook.buffer for hook in self._hooks]
        self._forget()
        silent = [place.index for place, shown in zip(self._places, buffers, strict=True) if shown is None]
        if silent:
            raise UnsupportedModel(
                f"experts of {len(silent)} MoE layers did not show what they were given in this forward pass",
                layer=silent[0],
                hint="hooks do not run in compiled code and CUDA graphs: turn them off, or name the layers to record",
            )
        with self._accounting():
            for shown, accumulator in zip(buffers, self._accumulators, strict=True):
                assert shown is not None
                accumulator.add(shown, self.counter.domains)
        self._labels.add(current.labels)
        if self._labels.is_due:
            self.flush()

    @contextlib.contextmanager
    def _accounting(self) -> Iterator[None]:
        """After an error in the books no figure of this recorder can be trusted: every later use raises it again."""
        if self._fault is not None:
            raise self._fault
        try:
            yield
        except MoekitError as error:
            self._fault = error
            raise

    def flush(self) -> None:
        """Add up what waits.

        Raises:
            NumericFault: NaN or infinity among gate weights or router logits, with the layer.
            BadData: a router chose what is no expert.
        """
        with self._accounting():
            labels = self._labels.flush()
            for accumulator in self._accumulators:
                accumulator.flush(labels, self.counter.domains)

    @property
    def needs_loss(self) -> bool:
        """Whether statistics read gradients, so that `backward` must follow each forward pass."""
        return bool(self._gradients)

    @property
    def is_awaited(self) -> bool:
        """Whether experts lie on several ranks, which then all take part in every pass."""
        return any(place.moe is not None and not holds_all_experts(place.moe.experts) for place in self._places)

    @property
    def device(self) -> torch.device:
        """Where the model takes its ids."""
        device: torch.device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        return device

    @property
    def tokens(self) -> int:
        """Tokens recorded so far, padding not counted."""
        return self._labels.tokens

    def trace(self) -> Trace:
        """What was recorded so far.

        Raises:
            NumericFault: NaN or infinity among gate weights or router logits, with the layer.
            BadData: a router chose what is no expert, or no pass was recorded at all.
        """
        self.flush()
        pairs = zip(self._places, self._accumulators, strict=True)
        if any(accumulator.top_k == 0 and place.moe is not None for place, accumulator in pairs):
            raise BadData("no forward pass was recorded", hint="run the model inside the `with` block")
        domains = list(self.counter.domains)
        pairs = zip(self._places, self._accumulators, strict=True)
        return assemble(
            {place.index: accumulator.record(domains) for place, accumulator in pairs},
            self._labels,
            domains,
            names=[entry.name for entry in self._entries],
            source=self.recording.source,
            begins=self.counter.begins,
            told=self._told,
        )


def _stands_for_nothing(arguments: Mapping[str, Any], expected: Labels | None) -> bool:
    """Whether a pass has no tokens at all, read from its mask; where rows are expected, nothing is read."""
    if expected is not None and len(expected.mask_BS):
        return False
    mask = arguments.get("attention_mask")
    return isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.any())


def _learns(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()
