"""Experts parts: how a layer's experts are computed.

transformers chooses an experts implementation by name; "moekit" walks the parts of the layer, the last attached first,
and ends at the implementation that was chosen before.

Legend: T tokens, K choices a token, H hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moekit.errors import UnsupportedModel
from moekit.runtime.inputs import PartInputs
from moekit.runtime.part import RuntimePart, Slot
from moekit.runtime.slots import PartOnLayer, slot_of

IMPLEMENTATION = "moekit"

# (hidden [T, H], indices [T, K], weights [T, K]) -> output [T, H]
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertsInputs(PartInputs):
    """What an experts part sees.

    Attributes:
        module: the experts module, for its weights.
        hidden_TH: tokens.
        index_TK: chosen experts; E is "no expert".
        weights_TK: their weights.
        run: computes the experts as without this part.
    """

    module: Any
    hidden_TH: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    run: Run


class ExpertsPart(RuntimePart):
    """A part that computes a layer's experts, or changes what goes in and comes out."""

    slot: ClassVar[Slot] = "experts"

    @abstractmethod
    def compute(self, inputs: ExpertsInputs) -> Tensor:
        """The experts' weighted sum for every token: [T, H]."""

    @abstractmethod
    def reference(self, inputs: ExpertsInputs) -> Tensor:
        """The same by the plain formula, one expert after the other, in fp32: [T, H] fp32. Slow; for tests."""


def _walk(module: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The experts implementation "moekit"."""
    slot = slot_of(module)
    if slot is None:
        raise UnsupportedModel(
            f'the experts implementation "{IMPLEMENTATION}" runs parts, but {type(module).__name__} carries none',
            hint="attach parts by moekit.runtime.attach, which chooses the implementation itself",
        )

    def run(position: int) -> Run:
        parts: Sequence[PartOnLayer] = slot.of_layer()
        if position < 0:
            return lambda *given: chosen(module, slot.chosen)(*given)
        on = parts[position]
        assert isinstance(on.part, ExpertsPart)
        part, inner = on.part, run(position - 1)

        def compute(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
            return part.compute(inputs_of(on, module, hidden_TH, index_TK, weights_TK, inner))

        return compute

    return run(len(slot.of_layer()) - 1)(hidden_TH, index_TK, weights_TK)


def inputs_of(
    on: PartOnLayer, module: nn.Module, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, run: Run
) -> ExpertsInputs:
    """What a part on a layer sees of one call."""
    slot = slot_of(module)
    assert slot is not None
    return ExpertsInputs(
        module=module,
        hidden_TH=hidden_TH,
        index_TK=index_TK,
        weights_TK=weights_TK,
        run=run,
        **on.common(slot.tracker),
    )


def chosen(module: nn.Module, name: str) -> Run:
    """A layer's experts by an implementation's name.

    Raises:
        UnsupportedModel: the experts do not follow transformers' experts interface.
    """
    eager = getattr(type(module).forward, "__wrapped__", None)
    if eager is None:
        raise UnsupportedModel(f"{type(module).__name__} does not go through transformers' experts interface")
    function = eager if name == "eager" else ALL_EXPERTS_FUNCTIONS[name]
    return lambda hidden_TH, index_TK, weights_TK: function(module, hidden_TH, index_TK, weights_TK)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _walk)
