"""What the experts of one layer were given on a whole text, kept to be gone through expert by expert.

Second moments X^T X of every expert and projection are E (H^2 + I^2) numbers a layer, more than its weights: so one
expert's are made at a time, consumed, and freed. What is kept instead is the layer's input, N H numbers, which go to a
file where they are many.

Legend: T positions of a batch, N tokens of the text, n tokens of one expert, K choices a token, E experts, H hidden, I
expert width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moekit.anatomy.probe import MoELayer
from moekit.errors import UnsupportedModel
from moekit.streaming.states import MEMORY_BYTES, States
from moekit.trace.batch import widest
from moekit.trace.each_expert import plain_expert
from moekit.trace.expert_batch import ExpertBatch
from moekit.trace.gram import Gram
from moekit.trace.seam import see_choices
from moekit.trace.sources.base import ForwardPass

# Tokens at a time that an expert is run on where it is run on all of them.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of one expert's inputs over a text.

    Attributes:
        expert: which one.
        tokens: n, tokens routed to it.
        inputs_HH: sum of x x^T, x what gate and up projection are given; fp64 (fp32 on Apple's GPUs).
        inner_II: sum of h h^T, h what the down projection is given.
    """

    expert: int
    tokens: int
    inputs_HH: Tensor
    inner_II: Tensor


class ExpertInputs:
    """Inputs of one layer's experts, batch by batch.

    Args:
        passes: the batches of the text.
        hidden: H.
        dtype: of the inputs.
        folder: where they go; None keeps them in memory up to `limit`.
        name: of the file there.
        limit: bytes kept in memory where no folder is given.
    """

    def __init__(
        self,
        passes: Sequence[ForwardPass],
        hidden: int,
        dtype: torch.dtype,
        *,
        folder: Path | None = None,
        name: str = "expert-inputs",
        limit: int = MEMORY_BYTES,
    ) -> None:
        shapes = [current.shape for current in passes]
        self._states = States(shapes, hidden, dtype, folder=folder, name=name, limit=limit)
        self._passes = list(passes)
        self._choices: dict[int, tuple[Tensor, Tensor]] = {}
        self._moe: MoELayer | None = None
        self._number = 0

    @property
    def experts(self) -> int:
        """E, of the layer that was watched last."""
        assert self._moe is not None
        return self._moe.geometry.experts

    @property
    def tokens(self) -> list[int]:
        """Tokens of each batch, padding left out."""
        return [len(current.labels.domain_N) for current in self._passes]

    @contextlib.contextmanager
    def watching(self, moe: MoELayer) -> Iterator[None]:
        """Keep what this layer's experts are given in the passes that run meanwhile, in order."""
        self._moe, self._number = moe, 0

        def see(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
            current = self._passes[self._number]
            self._states.put(self._number, hidden_TH.reshape(*current.shape, -1))
            self._choices[self._number] = (current.keep(index_TK).cpu(), current.keep(weights_TK).detach().cpu())
            self._number += 1

        handle = see_choices(moe, see)
        try:
            yield
        finally:
            handle.remove()

    def of(self, expert: int) -> Iterator[ExpertBatch]:
        """What one expert was given and made of it, batch by batch; the layer must still be loaded.

        Raises:
            UnsupportedModel: this family's experts do not follow the plain formula.
        """
        return (batch for _, _, batch in self.placed(expert))

    def placed(self, expert: int) -> Iterator[tuple[int, Tensor, ExpertBatch]]:
        """The same with the number of the pass, and which of its tokens, padding left out, these are."""
        assert self._moe is not None  # watched before
        one = plain_expert(self._moe.experts)
        if one is None:
            raise self._unshown()
        device = next(self._moe.experts.parameters()).device
        for number, current in enumerate(self._passes):
            index_NK, weights_NK = self._choices[number]
            token_n, slot_n = (index_NK == expert).nonzero(as_tuple=True)
            if not len(token_n):
                continue
            hidden_nH = self._states.rows(number, current.positions_of(token_n)).to(device)
            if self._moe.geometry.weighs_inputs:
                hidden_nH = hidden_nH * weights_NK[token_n, slot_n].to(hidden_nH)[:, None]
            with torch.no_grad():
                inner_nI, output_nH = one(expert, hidden_nH)
            weight_n = weights_NK[token_n, slot_n].to(device)
            yield number, token_n, ExpertBatch(expert, weight_n, hidden_nH, inner_nI, output_nH)

    def inner(self, expert: int, rows: int = _ROWS) -> Iterator[Tensor]:
        """What one expert's down projection is given on every token, chosen or not, some tokens [n, I] at a time.

        The same tokens in the same order for each expert, padding left out; weights of choices do not enter. The layer
        must still be loaded.

        Raises:
            UnsupportedModel: this family's experts do not show it.
        """
        assert self._moe is not None  # watched before
        one, device = plain_expert(self._moe.experts), next(self._moe.experts.parameters()).device
        for number, current in enumerate(self._passes):
            hidden_NH = current.keep(self._states.get(number).flatten(0, 1))
            for hidden_nH in torch.split(hidden_NH, rows):
                with torch.no_grad():
                    inner_nI = None if one is None else one(expert, hidden_nH.to(device))[0]
                if inner_nI is None:
                    raise self._unshown()
                yield inner_nI

    def _unshown(self) -> UnsupportedModel:
        assert self._moe is not None
        return UnsupportedModel(
            f"{type(self._moe.experts).__name__} does not show the inputs of its down projections",
            layer=self._moe.index,
            hint="give the unquantized checkpoint",
        )

    def second_moments(self) -> Iterator[Moments]:
        """Each expert's second moments, one expert in memory at a time; zeros where no token chose it."""
        assert self._moe is not None
        yield from map(self.moments, range(self._moe.geometry.experts))

    def moments(self, expert: int) -> Moments:
        """One expert's second moments; the layer must still be loaded."""
        assert self._moe is not None
        geometry = self._moe.geometry
        device = next(self._moe.experts.parameters()).device
        inputs, inner = Gram(geometry.hidden, device), Gram(geometry.width, device)
        for batch in self.of(expert):
            inputs.add(batch.hidden_nH)
            inner.add(batch.inner_nI)
        return Moments(expert, inputs.rows, inputs.total(), inner.total())

    def gated_moment(self, expert: int) -> Tensor:
        """Sum of g^2 h h^T over the inputs of one expert's down projection, [I, I], g the gate weight.

        Where gate weights multiply what experts are given, h holds them already, and g is 1.
        """
        assert self._moe is not None
        device = next(self._moe.experts.parameters()).device
        width, dtype = self._moe.geometry.width, widest(device)
        moment_II = torch.zeros(width, width, dtype=dtype, device=device)
        for batch in self.of(expert):
            gated_nI = batch.inner_nI.to(dtype)
            if not self._moe.geometry.weighs_inputs:
                gated_nI = gated_nI * batch.weights_n.to(dtype)[:, None]
            moment_II += gated_nI.T @ gated_nI
        return moment_II

    def close(self) -> None:
        """Forget the inputs."""
        self._states.close()
        self._choices.clear()
