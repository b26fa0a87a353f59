"""One way of a text through a model: a paused forward pass for each of its batches.

Legend: B rows, S positions, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit._memory import return_freed_memory
from moekit.errors import UnsupportedModel
from moekit.streaming.answers import Answers
from moekit.streaming.nested import Unstorable, hidden_of, mapped, tensors_in, with_hidden
from moekit.streaming.one_batch import WHOLE, OneBatch
from moekit.streaming.parking import Parking, kept_by, storages_of
from moekit.streaming.paused import Call, nothing_collected
from moekit.streaming.spill import Spill

if TYPE_CHECKING:
    from moekit.streaming.walk import Walk

log = logging.getLogger(__name__)

# So many bytes laid down, the allocator is asked to give back what it keeps of them.
_FREED_BYTES = 1 << 26


class Passes:
    """Every batch of a text, each in a forward pass that stands before some layer.

    Made by `Walk.passes`. A layer is run on a batch (`run`), again if need be, and what it answered goes on (`go_on`).

    Args:
        walk: whose batches these are.
        name: of the files that a later run goes on from.
        resumed: keep those, in the walk's folder.
        limit: bytes that all passes may hold in memory; beyond, passes that are not worked on lie in a file.
    """

    def __init__(self, walk: Walk, name: str, *, resumed: bool, limit: int) -> None:
        self._walk = walk
        self._limit = limit
        self._spill = Spill(walk.folder)
        self._answers = Answers(walk.folder, name) if resumed and walk.folder is not None else None
        self._batches: list[OneBatch] = []
        self._open: int | None = None
        # Addresses that others hold as well, and the tensors themselves, so that no address is given out again.
        self._shared: set[int] | None = None
        self._freed = 0
        self._keep: list[torch.UntypedStorage] = []
        # Decoder layer -> whether it writes into what it is given.
        self._writes: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self._walk.batches)

    @property
    def only_answers(self) -> bool:
        """Whether nothing but the layers' answers was handed from one to the next so far."""
        return all(batch.handed.only_answers for batch in self._batches)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes that all passes hold in memory, and on disk."""
        kept = sum(batch.nbytes for batch in self._batches if not batch.parking.away)
        return kept, sum(batch.parking.nbytes for batch in self._batches)

    @torch.no_grad()
    def begin(self, after: int = -1) -> int:
        """Take every batch up to its first layer; embedding and all else before that must be loaded.

        Args:
            after: the layer that an earlier run had come to; the passes go on behind it if its answers are in the
                folder.

        Returns:
            The layer behind which they stand: `after`, or -1.

        Raises:
            UnsupportedModel: the model's forward does not come to the first layer first.
        """
        if self._answers is None or not self._answers.sealed(after, len(self)):
            after = -1
        for number in range(len(self)):
            if after < 0:
                self._enter(number, 0, None)
                continue
            answer = self._on_device(self._answers.get(after, number))  # type: ignore[union-attr]
            batch = self._enter(number, after, answer)
            batch.answered(answer)
            if after + 1 < self._walk.loader.layers:
                self._advance(batch)
        if self._open is not None:
            batch = self._batches[self._open]
            batch.nbytes = batch.own_bytes(self._shared or set())
        kept, away = self.nbytes
        log.info("%d paused passes hold %.1f MB in memory and %.1f MB in files", len(self), kept / 1e6, away / 1e6)
        return after

    def begin_loaded(self, after: int = -1) -> int:
        """Begin with embedding and all else that belongs to no layer loaded for as long as that takes.

        Towers are loaded where a batch shows something beside text.
        """
        self._walk.loader.load_rest(towers=any(batch.more is not None for batch in self._walk.batches))
        try:
            return self.begin(after)
        finally:
            self._walk.loader.release_rest()

    @torch.no_grad()
    def parted(self, name: str) -> Passes:
        """Passes of their own that stand where these stand.

        Raises:
            UnsupportedModel: more than answers was handed on so far, which cannot be told apart any more.
        """
        made = Passes(self._walk, name, resumed=False, limit=self._limit)
        for number in range(len(self)):
            batch = self._opened(number)
            call = self._waiting(batch)
            if call.index and not batch.handed.arrived_with_answers:
                raise UnsupportedModel(
                    f"{type(self._walk.loader.model).__name__} hands on more than hidden states between layers",
                    layer=call.index,
                    hint="change its first MoE layer too, or write the changed model and evaluate that",
                )
            made._enter(number, call.index, mapped(batch.last, Tensor.clone))
        return made

    @torch.no_grad()
    def run(self, index: int, number: int, hidden: Tensor | None = None) -> Tensor:
        """Run a decoder layer, which must be loaded, on a batch; the pass stays before it.

        Args:
            index: the layer, at which the pass must stand.
            number: of the batch.
            hidden: in place of the hidden states that came; None for those.

        Returns:
            The layer's hidden states, [B, S, H] (or as this model has them); they go on unless others are put.

        Raises:
            UnsupportedModel: the pass stands at another layer.
        """
        batch = self._opened(number)
        call = self._waiting(batch)
        if call.index != index:
            raise UnsupportedModel(
                f"{type(self._walk.loader.model).__name__} comes to layer {call.index} where layer {index} was due",
                layer=index,
                hint=f"it skips layers, or does not run them in order; {WHOLE}",
            )
        if hidden is not None:
            call = call.with_hidden(hidden.to(self._walk.loader.device))
        first = batch.answer is None
        self._writes[index] = batch.run(self._walk.loader.layer(index), call, self._writes.get(index))
        if first:
            own = self._waiting(batch)
            batch.handed.ran(tensors_in([own.args, own.kwargs]))
        return self.get(number)

    def get(self, number: int) -> Tensor:
        """Hidden states of a batch behind the last layer that was run on it, [B, S, H]."""
        batch = self._opened(number)
        if batch.answer is None:
            return self._waiting(batch).hidden.detach()
        return hidden_of(batch.answer).detach()

    def put(self, number: int, hidden: Tensor) -> None:
        """Let other hidden states go on than the layer answered, [B, S, H]."""
        batch = self._opened(number)
        batch.answered(with_hidden(batch.answer, hidden.to(self._walk.loader.device)))

    def answer(self, number: int) -> Any:
        """The whole answer of the layer that was run last, as it goes on."""
        return mapped(self._opened(number).answer, Tensor.detach)

    def rows(self, places: Sequence[tuple[int, int]], length: int) -> Any:
        """The answer that waits, of some rows only, cut at a length.

        Args:
            places: (number of a batch, row) of each.
            length: positions.
        """
        read = {number: self.answer(number) for number in dict.fromkeys(number for number, _ in places)}
        like, *_ = read.values()
        hidden = torch.stack([hidden_of(read[number])[row, :length] for number, row in places])
        return with_hidden(like, hidden)

    @torch.no_grad()
    def go_on(self, index: int, number: int | None = None) -> None:
        """Let what layer `index` answered go on to the next layer; behind the last one it waits for `finish`.

        Args:
            index: the layer that was run.
            number: of the batch; None for all.
        """
        for each in range(len(self)) if number is None else (number,):
            batch = self._opened(each)
            if self._answers is not None:
                self._store(batch, index, each)
            if index + 1 < self._walk.loader.layers:
                self._advance(batch)

    def seal(self, index: int) -> None:
        """All batches have passed layer `index`: a later run may go on behind it, if answers are all it needs."""
        if self._answers is not None and not (self.only_answers and self._answers.seal(index, len(self))):
            self._answers.forget()

    @torch.no_grad()
    def finish(self, number: int) -> Any:
        """What the model's forward gives for a batch, all layers having run; norm and head must be loaded.

        Raises:
            UnsupportedModel: the forward comes to yet another layer.
        """
        batch = self._opened(number)
        if batch.paused.call is not None:
            self._advance(batch)
        if batch.paused.call is not None:
            raise UnsupportedModel(
                f"{type(self._walk.loader.model).__name__} comes to layer {batch.paused.call.index} again", hint=WHOLE
            )
        return batch.paused.result

    def waiting(self, number: int) -> int | None:
        """The layer that a batch stands before; None when its forward has ended."""
        call = self._batches[number].paused.call
        return None if call is None else call.index

    def close(self) -> None:
        """End all passes and give their files back; what a later run goes on from stays."""
        for batch in self._batches:
            batch.paused.close()
        self._batches.clear()
        self._open = None
        self._spill.close()
        if self._answers is not None:
            self._answers.close()

    def _enter(self, number: int, index: int, answer: Any) -> OneBatch:
        """Begin a batch's pass, and take it up to a layer; those before give this answer."""
        paused = self._walk.paused(self._walk.inputs(number))
        batch = OneBatch(paused, Parking(self._spill), type(self._walk.loader.model).__name__)
        self._batches.append(batch)
        with nothing_collected(self._walk.loader.model):
            paused.begin()
        for due in range(index + 1):
            call = paused.call
            if call is None or call.index != due:
                came = "to the end" if call is None else f"to layer {call.index}"
                raise UnsupportedModel(
                    f"{type(self._walk.loader.model).__name__} comes {came} where layer {due} was due",
                    layer=due,
                    hint=f"it skips layers, or does not run them in order; {WHOLE}",
                )
            if due == 0:
                batch.handed.stopped(batch.held())
            if due < index:
                # The same for all: only the last of them is seen by the layer where the pass waits.
                batch.answered(mapped(answer, Tensor.clone))
                batch.go_on()
        before, self._open = self._open, number
        if before is not None:
            self._settle(before, beside=number)
        return batch

    def _advance(self, batch: OneBatch) -> None:
        assert batch.answer is not None
        batch.go_on()

    def _waiting(self, batch: OneBatch) -> Call:
        if batch.paused.call is None:
            raise UnsupportedModel(
                f"{type(self._walk.loader.model).__name__} has ended without coming to this layer", hint=WHOLE
            )
        return batch.paused.call

    def _opened(self, number: int) -> OneBatch:
        """A batch's pass, its tensors in their places."""
        batch = self._batches[number]
        if self._open != number:
            before, self._open = self._open, number
            if before is not None:
                self._settle(before)
            if batch.parking.away:
                batch.parking.restore()
                batch.handed.moved(batch.held())
        return batch

    def _settle(self, number: int, beside: int | None = None) -> None:
        """A pass is not worked on any more: count what it holds, and park it where that is too much.

        Args:
            number: of the batch.
            beside: a batch whose pass has just begun: what both hold belongs to neither.
        """
        batch = self._batches[number]
        held = batch.held()
        if self._shared is None:
            self._shared = kept_by(self._walk.loader.model)
            other = storages_of(self._batches[beside].held()) if beside is not None else {}
            both = [storage for address, storage in storages_of(held).items() if address in other]
            self._keep.extend(both)
            self._shared |= {storage.data_ptr() for storage in both}
        shared = self._shared
        batch.nbytes = batch.own_bytes(self._shared or set())
        others = sum(b.nbytes for b in self._batches if b is not batch and not b.parking.away)
        if others + batch.nbytes > self._limit or self._walk.loader.device.type != "cpu":
            batch.parking.park(held, shared.__contains__)
            self._freed += batch.parking.nbytes
            if self._freed > _FREED_BYTES:
                self._freed = 0
                return_freed_memory()

    def _store(self, batch: OneBatch, index: int, number: int) -> None:
        assert self._answers is not None
        if not batch.handed.only_answers:
            return
        try:
            self._answers.put(index, number, batch.answer)
        except Unstorable:
            batch.handed.only_answers = False

    def _on_device(self, answer: Any) -> Any:
        return mapped(answer, lambda tensor: tensor.to(self._walk.loader.device))
