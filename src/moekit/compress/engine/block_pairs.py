"""What a layer's block is given on some tokens of a text, and the cosine of that and what it gives.

Legend: N tokens kept, n tokens of a batch, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moekit.trace.sources.base import ForwardPass, Place
from moekit.trace.sources.streams import BlockProbe

# Compared: the block's own input and output, or the residual stream before and after the block is added to it.
Compared = Literal["block", "stream"]


class BlockPairs:
    """Keeps them for the layer that the text stands at.

    Args:
        of: what is compared.
        tokens: of the text.
        most: tokens kept, evenly over the text.
    """

    def __init__(self, of: Compared, tokens: int, most: int) -> None:
        self._of = of
        self._step = max(1, -(-tokens // most))
        self._probe: BlockProbe | None = None
        self._seen = 0
        self._given: list[Tensor] = []
        self._cosine: list[Tensor] = []

    @contextlib.contextmanager
    def watching(self, place: Place) -> Iterator[None]:
        """Look at a layer in the passes that run meanwhile, in order; what was kept of another is forgotten."""
        self._given, self._cosine, self._seen = [], [], 0
        self._probe = probe = BlockProbe(place)
        probe.active = True
        handles = list(probe.hooks())
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, current: ForwardPass) -> None:
        """Keep some tokens of a pass that has run."""
        assert self._probe is not None
        parts = self._probe.parts(current)
        self._probe.clear()
        given_nH, made_nH = parts["block_input"], parts["block_output"]
        if self._of == "stream":
            given_nH, made_nH = parts["stream"] - made_nH, parts["stream"]
        first = -self._seen % self._step
        self._seen += len(given_nH)
        given_nH, made_nH = given_nH[first :: self._step], made_nH[first :: self._step]
        self._given.append(given_nH.clone())
        self._cosine.append(cosine_similarity(given_nH.float(), made_nH.float(), dim=-1))

    @property
    def given_NH(self) -> Tensor:
        """What the block is given."""
        return torch.cat(self._given)

    @property
    def cosine_N(self) -> Tensor:
        """Cosines, fp32."""
        return torch.cat(self._cosine)
