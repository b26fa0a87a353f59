"""Block parts: what happens to a MoE block's output before the decoder layer adds it to the residual stream.

Legend: B sequences, S positions, H hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from moekit.checkpoint.names import PARTS
from moekit.runtime.inputs import PartInputs
from moekit.runtime.part import RuntimePart, Slot
from moekit.runtime.slots import SlotParts


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockInputs(PartInputs):
    """What a block part sees.

    Attributes:
        hidden: what the block was given, [B, S, H] (or [T, H], as the family calls it).
        output: what it gives, as earlier parts left it; like `hidden`.
    """

    hidden: Tensor
    output: Tensor


class BlockPart(RuntimePart):
    """A part that changes the block's output."""

    slot: ClassVar[Slot] = "block"

    @abstractmethod
    def after(self, inputs: BlockInputs) -> Tensor:
        """What the decoder layer adds to the residual stream, shaped like `inputs.output`."""


class BlockWithParts(nn.Module):
    """Mixin that hands a block's output through parts; combined with the stock class when parts are attached."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock output, changed; what a block returns beside it stays."""
        given = super().forward(*args, **kwargs)
        output = given[0] if isinstance(given, tuple) else given
        hidden = args[0] if args else kwargs["hidden_states"]
        slot = self._modules[PARTS]
        assert isinstance(slot, SlotParts)
        for on in slot.of_layer():
            assert isinstance(on.part, BlockPart)
            output = on.part.after(BlockInputs(hidden=hidden, output=output, **on.common(slot.tracker)))
        return (output, *given[1:]) if isinstance(given, tuple) else output
