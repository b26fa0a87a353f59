"""One batch of a text in its paused forward pass, with what was answered and what is known of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from moekit.errors import UnsupportedModel
from moekit.streaming.handed_on import HandedOn
from moekit.streaming.nested import tensors_in
from moekit.streaming.parking import Parking, storages_of
from moekit.streaming.paused import Call, PausedPass

WHOLE = "run it whole: it cannot be streamed layer by layer"


class OneBatch:
    """One batch's pass, and what is known of it.

    Attributes:
        paused: the pass.
        answer: of the layer it waits at; None before that has run.
        last: the answer that was handed on last.
        written: copies that the layer wrote into what it was given in, with what they are copies of.
    """

    def __init__(self, paused: PausedPass, parking: Parking, model: str) -> None:
        self._model = model
        self.paused = paused
        self.parking = parking
        self.handed = HandedOn()
        self.answer: Any = None
        self.last: Any = None
        self.written: list[tuple[Tensor, Tensor]] = []
        self.nbytes = 0
        self._held: list[Tensor] | None = None

    def held(self) -> list[Tensor]:
        """All tensors of the pass, the answers among them."""
        if self._held is None:
            self._held = tensors_in([self.paused.held(), self.answer, self.last])
        return self._held

    def answered(self, answer: Any) -> None:
        """The layer that waits has run."""
        self.answer, self._held = answer, None

    def run(self, layer: nn.Module, call: Call, writes: bool | None) -> bool:
        """Run the layer that waits; where it writes into what it is given, on a copy, so that it can be run again.

        Args:
            layer: the layer.
            call: with what it is called.
            writes: whether it is known to write into that; None if nobody knows.

        Returns:
            Whether it does.
        """
        if writes is False:
            self.answered(self.paused.run(layer, call))
            return False
        copied, pairs = call.copied()
        before = [copy._version for copy, _ in pairs]
        self.answered(self.paused.run(layer, copied))
        self.written = [pair for pair, version in zip(pairs, before, strict=True) if pair[0]._version != version]
        return bool(self.written)

    def own_bytes(self, shared: Collection[int]) -> int:
        """Bytes that only this pass holds; storages at these addresses are others' as well."""
        return sum(s.nbytes() for address, s in storages_of(self.held()).items() if address not in shared)

    def go_on(self) -> None:
        """Hand the answer on, and go up to the next layer or to the end.

        Raises:
            UnsupportedModel: code between layers uses weights that have left memory.
        """
        try:
            self._go_on()
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            raise self._weights_between(str(error)) from error
        if self.paused.call is not None and self.paused.call.hidden.is_meta:
            raise self._weights_between(f"before layer {self.paused.call.index}")

    def _weights_between(self, told: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._model} uses weights between its layers that are in memory only while it begins and ends ({told})",
            hint=WHOLE,
        )

    def _go_on(self) -> None:
        for copy, given in self.written:
            given.copy_(copy)
        self.written = []
        self.last, self.answer, self._held = self.answer, None, None
        self.handed.handing(self.last)
        self.paused.go_on(self.last)
        if self.paused.call is None:
            self.last = None
        else:
            self.handed.stopped(self.held())
