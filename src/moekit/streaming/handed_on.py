"""Whether a pass hands on nothing between layers but what the layers answer.

Then the last answers are all that is needed to go on elsewhere: after the process has ended, or on a way of its own
beside the first one. It is not so where layers write into something that later ones read (keys and values shared
between layers), or where the model keeps what an early layer answered for a late one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from moekit.streaming.nested import tensors_in


class HandedOn:
    """Watches what a pass holds each time it stops.

    Attributes:
        only_answers: nothing else was handed on so far, nor written by the layer that waits.
        arrived_with_answers: nothing else was handed on up to the layer that waits.
    """

    def __init__(self) -> None:
        self.only_answers = self.arrived_with_answers = True
        # Known by itself: id -> reference, version, whether it was there before the first layer.
        self._known: dict[int, tuple[weakref.ref[Tensor], int, bool]] = {}
        self._stops = 0
        self._answered: dict[int, int] = {}

    def handing(self, answer: Any) -> None:
        """The answer of the layer that waits is about to be handed on."""
        self._answered = {id(tensor): tensor._version for tensor in tensors_in([answer])}

    def stopped(self, held: Iterable[Tensor]) -> None:
        """The pass, holding these, stands before the next layer."""
        known: dict[int, tuple[weakref.ref[Tensor], int, bool]] = {}
        answered = self._answered
        for tensor in held:
            before = self._of(tensor)
            first = self._stops == 0
            if before is not None:
                first = before[2]
                if (first and before[1] != tensor._version) or (not first and id(tensor) not in answered):
                    self.only_answers = False
            elif answered.get(id(tensor), tensor._version) != tensor._version:
                self.only_answers = False  # changed in place since it was handed on
            known[id(tensor)] = (weakref.ref(tensor), tensor._version, first)
        self._known = known
        self.arrived_with_answers = self.only_answers
        self._stops += 1

    def ran(self, held: Iterable[Tensor]) -> None:
        """The layer has run, and the pass still stands before it: what is new was written by the layer."""
        for tensor in held:
            before = self._of(tensor)
            if before is None or before[1] != tensor._version:
                self.only_answers = False

    def moved(self, held: Iterable[Tensor]) -> None:
        """What the pass holds was put on disk and back: that is no change."""
        for tensor in held:
            before = self._of(tensor)
            if before is not None:
                self._known[id(tensor)] = (before[0], tensor._version, before[2])

    def _of(self, tensor: Tensor) -> tuple[weakref.ref[Tensor], int, bool] | None:
        known = self._known.get(id(tensor))
        return known if known is not None and known[0]() is tensor else None
