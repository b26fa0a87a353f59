"""What a forward pass knows: made when the base model begins, dropped when it ends.

Parts see tokens as rows [T, H]; here they learn which row is which: sequences, padding, what came before, the layer
before this one. Nothing is passed through the stock code: a hook on the base model begins and ends the pass.

*Activation checkpointing* repeats a layer during the backward pass, when the pass has ended. Repetitions find the pass
that they belong to by the tensors that the layer's attention is called with (rotary embeddings are made anew in each
pass). They read what the first time left and leave nothing. Reentrant checkpointing runs the first time without a
graph, so that what one layer hands to the next carries no gradient: it is refused.

Legend: B sequences, S positions of this pass, L positions so far (cached and of this pass), T = B * S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.errors import UnsupportedModel
from moekit.runtime.cache import PartCache

if TYPE_CHECKING:
    from moekit.runtime.attention import BlockAttention
    from moekit.runtime.tracker import PassTracker


@dataclass(eq=False)
class ForwardContext:
    """One forward pass.

    Attributes:
        number: passes of this model counted from 0.
        batch: B.
        length: S.
        past: positions in the key-value cache before this pass.
        training: whether the model is in training mode.
        armed: whether the pass builds a graph to train on.
        input_ids: [B, S]; None where embeddings were given.
        attention_mask: [B, L], True at tokens; None where none, or no 2-D one, was given.
        position_ids: [B, S] or [1, S]; None where none were given.
        layers: decoder layers that are MoE, in order.
        rows: overrides by sequence, see `moekit.runtime.tracker.rows`: name -> [B, ...].
        step: optimizer step under way, 0 outside of training.
        steps: optimizer steps of the run, 0 outside of training.
        cache: lives as long as `past_key_values`; None where the pass keeps nothing.
    """

    tracker: PassTracker
    number: int
    batch: int
    length: int
    past: int
    training: bool
    armed: bool
    input_ids: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    layers: tuple[int, ...]
    rows: Mapping[str, Tensor]
    step: int
    steps: int
    cache: PartCache | None
    _seen: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    _marks: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """Share of the run that is done: 0 to 1; 0 outside of training."""
        return self.step / self.steps if self.steps else 0.0

    def put(self, layer: int, name: str, value: Tensor) -> None:
        """Leave something for later layers of this pass; a repetition leaves nothing."""
        if not self.tracker.repeating:
            self._seen[layer, name] = value

    def get(self, layer: int, name: str) -> Tensor:
        """What a layer left.

        Raises:
            UnsupportedModel: it left nothing under this name: layers do not run in order.
        """
        if (layer, name) not in self._seen:
            raise UnsupportedModel(
                f"nothing called {name!r} was left by layer {layer} in this forward pass",
                layer=layer,
                hint="parts that hand something on need the MoE layers to run one after the other, in one process",
            )
        return self._seen[layer, name]

    def before(self, layer: int) -> int | None:
        """The MoE layer before this one; None for the first."""
        place = self.layers.index(layer)
        return self.layers[place - 1] if place else None

    def generator(self, layer: int, seed: int = 0, device: torch.device | None = None) -> torch.Generator:
        """For random draws: the same for a repetition of this pass, another for each pass and layer."""
        mixed = (seed * 1_000_003 + self.number) * 1_000_003 + layer
        return torch.Generator(device or "cpu").manual_seed(mixed % 2**63)

    def sequences(self, values: Tensor) -> Tensor:
        """Rows of tokens [T, ...] as sequences [B, S, ...]."""
        return values.reshape(self.batch, self.length, *values.shape[1:])

    def of_rows(self, name: str) -> Tensor | None:
        """An override by token: [T, ...]; None where none is set."""
        value = self.rows.get(name)
        return None if value is None else value.repeat_interleave(self.length, dim=0)

    def token_mask(self, device: torch.device) -> Tensor:
        """True at tokens of this pass, False at padding: [B, S] bool."""
        if self.attention_mask is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=device)
        return self.attention_mask[:, -self.length :].to(device)

    def visible(self, device: torch.device) -> Tensor:
        """Which positions each position may look at: causal, no padding, not another packed sequence: [B, S, L] bool.

        Sequences packed in a row are told apart by position numbers that begin again, as transformers does.
        """
        reach = self.past + self.length
        query = torch.arange(self.past, reach, device=device)
        mask = (torch.arange(reach, device=device) <= query[:, None]).expand(self.batch, -1, -1)
        if self.attention_mask is not None:
            if self.attention_mask.shape[1] != reach:
                raise UnsupportedModel(
                    f"the attention mask covers {self.attention_mask.shape[1]} positions of {reach}",
                    hint="give it for the cached positions too",
                )
            mask = mask & self.attention_mask.to(device)[:, None, :]
        elif self.position_ids is not None and not self.past:
            start = self.position_ids.to(device).diff(dim=1, prepend=self.position_ids[:, :1].to(device) - 1) != 1
            sequence = start.cumsum(dim=1)
            mask = mask & (sequence[:, :, None] == sequence[:, None, :])
        # A padded position looks at itself, so that no row is empty.
        return mask | (torch.arange(reach, device=device) == query[:, None])

    def extend(self, layer: int, name: str, values: Tensor) -> Tensor:
        """Values of all positions so far: those in the cache, then these: [B, S, ...] -> [B, L, ...].

        Raises:
            UnsupportedModel: earlier positions were computed without this part.
        """
        if self.cache is None:
            self._refuse_past(layer, name)
            return values
        return self.cache.extend(layer, name, values, self.past)

    def _refuse_past(self, layer: int, name: str) -> None:
        if self.past:
            raise UnsupportedModel(
                f"{self.past} earlier positions were computed without keeping what {name!r} needs of them",
                layer=layer,
                hint="let one model, with its parts attached, fill the key-value cache from the first position",
            )

    def keep(self, layer: int, name: str, value: Tensor) -> None:
        """Keep a state of each sequence [B, ...] for the positions that follow; without a cache none is kept."""
        if self.cache is not None and not self.tracker.repeating:
            self.cache.write(layer, name, value, self.past + self.length)

    def kept(self, layer: int, name: str) -> Tensor | None:
        """The state that earlier positions left: [B, ...]; None where this pass begins the sequences.

        Raises:
            UnsupportedModel: they were computed without this part, or the cache was cut back since.
        """
        if self.cache is not None:
            return self.cache.read(layer, name, self.past)
        self._refuse_past(layer, name)
        return None

    def attention(self, layer: int) -> BlockAttention:
        """The attention of the layer's block in this pass, to mix other values by it.

        Raises:
            UnsupportedModel: the decoder layer has no attention that can be asked.
        """
        return self.tracker.attention_of(layer)
