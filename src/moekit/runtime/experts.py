"""Experts parts: how a layer's experts are computed.

A layer has one list of parts, and a call of its experts walks it from outside to inside:

    parts that watch (recording), the last that came first
    parts of a record, the last attached first
    parts that stand in for the experts (expert parallelism)
    the family's own experts, by whatever implementation transformers is told to use

Those in the middle are configs that a checkpoint names (`ExpertsPart`); the others come and go and are never saved
(`TransientPart`). Each is given what to compute and `run`, which computes it as without this part.

Legend: T tokens, K choices a token, H hidden.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from moekit.anatomy.probe import Geometry
from moekit.checkpoint.names import PARTS
from moekit.errors import BadConfig, UnsupportedModel
from moekit.runtime.inputs import PartInputs
from moekit.runtime.part import RuntimePart, Slot
from moekit.runtime.slots import PartOnLayer, SlotParts, slot_of

# (hidden [T, H], indices [T, K], weights [T, K]) -> output [T, H]
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertsInputs(PartInputs):
    """What an experts part sees.

    Attributes:
        module: the experts module, for its weights; where experts lie on ranks it holds this rank's only.
        hidden_TH: tokens.
        index_TK: chosen experts; E is "no expert".
        weights_TK: their weights.
        run: computes the experts as without this part.
        shares_out: whether a token's weights add up to the same however few it chooses; told where the part asks for
            the gate (`asks_gate`).
        unwatched: of a part that watches: `run` without those that watch further inside, for calls that the block does
            not make; None where nobody does.
    """

    module: Any
    hidden_TH: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    run: Run
    shares_out: bool = True
    unwatched: Run | None = None


class ExpertsPart(RuntimePart):
    """A part that computes a layer's experts, or changes what goes in and comes out.

    Attributes:
        reads_weights: whether it looks at the experts' own weights; one that does not computes them by `run` alone, and
            so works where they lie on ranks, too, if it calls `run` equally often on every rank, whatever its tokens:
            each call is an exchange in which all ranks take part.
    """

    slot: ClassVar[Slot] = "experts"
    reads_weights: ClassVar[bool] = True

    @property
    def asks_gate(self) -> bool:
        """Whether it must know how the router weighs choices; then a layer whose gate is not known is refused."""
        return False

    def check_dealt_out(self, layer: int) -> None:
        """Refuse experts that lie on several ranks, unless the part can stand over them.

        Raises:
            BadConfig: it reads the experts' weights, of which a rank has its share only.
        """
        if self.reads_weights:
            raise BadConfig(
                f"{type(self).__name__} reads the experts' weights, but a rank holds its own experts only",
                layer=layer,
                hint="run it in one process; a part that computes by `run` alone, equally often whatever its tokens, "
                "says `reads_weights = False`",
            )

    @abstractmethod
    def compute(self, inputs: ExpertsInputs) -> Tensor:
        """The experts' weighted sum for every token: [T, H]."""

    @abstractmethod
    def reference(self, inputs: ExpertsInputs) -> Tensor:
        """The same by the plain formula, one expert after the other, in fp32: [T, H] fp32. Slow; for tests."""


class TransientPart(ABC):
    """An experts part of one layer that comes and goes: no config, no place in a checkpoint, nothing learned.

    Attributes:
        layer: decoder layer index.
        geometry: sizes of the layer.
        watches: whether it stands outside of all others and sees the calls as the block makes them; by default it
            stands inside, in the experts' place.
    """

    watches: ClassVar[bool] = False

    layer: int
    geometry: Geometry

    @abstractmethod
    def compute(self, inputs: ExpertsInputs) -> Tensor:
        """See `ExpertsPart.compute`."""


class ExpertsWithParts(nn.Module):
    """Mixin that walks a layer's parts; combined with the stock experts class while there are any."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' weighted sums as all parts together make them, shaped like the hidden states.

        Raises:
            UnsupportedModel: the block gives them something else than [T, H], [T, K], [T, K].
        """
        slot = self._modules[PARTS]
        assert isinstance(slot, SlotParts)
        own = slot.own_forward or super().forward
        names = _arguments(type(self).stock_class)  # type: ignore[attr-defined]
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden, index, weights = (given.pop(name) for name in names[:3])
        rows = _rows(hidden), _rows(index), _rows(weights)
        if rows[1].shape != rows[2].shape or len(rows[0]) != len(rows[1]):
            raise _wrong_call(self, dict(zip(names, rows, strict=False)))

        def run(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
            answer: Tensor = own(hidden_TH, index_TK, weights_TK, **given)
            return answer

        run_all: Run = run
        unwatched: Run | None = None
        for part in slot.from_inside():
            inside = run_all
            run_all = functools.partial(_through, part, self, inside, unwatched)
            if unwatched is None and isinstance(part, TransientPart) and part.watches:
                unwatched = inside
        answer = run_all(*rows)
        return answer if answer.shape == hidden.shape else answer.view(hidden.shape)


def _wrong_call(experts: ExpertsWithParts, given: dict[str, Tensor]) -> UnsupportedModel:
    slot = slot_of(experts)
    first = next(iter(slot.from_inside()), None) if slot is not None else None
    stock: type[nn.Module] = type(experts).stock_class  # type: ignore[attr-defined]
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
    return UnsupportedModel(
        f"{stock.__name__} is called with {shapes}, not with [T, H], [T, K], [T, K]",
        layer=None if first is None else first.layer,
        hint="parts, recording and expert parallelism cannot stand over such experts: take them off, or name others",
    )


@functools.cache
def _arguments(stock: type[nn.Module]) -> tuple[str, ...]:
    """Names of what a family's experts are called with: hidden states, indices, weights, and anything beyond."""
    return tuple(inspect.signature(stock.forward).parameters)[1:]


def refuse_other_calls(experts: nn.Module, layer: int) -> None:
    """Refuse experts that are not called with hidden states, indices and weights.

    Raises:
        UnsupportedModel: they are called in another way.
    """
    stock: type[nn.Module] = getattr(type(experts), "stock_class", type(experts))
    names = _arguments(stock)  # type: ignore[arg-type]
    if len(names) < 3:
        raise UnsupportedModel(
            f"{stock.__name__} is called with {', '.join(names)}, not with hidden states, indices and weights",
            layer=layer,
            hint="experts parts, recording and expert parallelism need this family's experts to follow the contract",
        )


def _rows(values: Tensor) -> Tensor:
    """[T, ...]: the very tensor where it is that already, so that others may know it again."""
    return values if values.dim() == 2 else values.reshape(-1, values.shape[-1])


def _through(
    part: PartOnLayer | TransientPart,
    module: nn.Module,
    run: Run,
    unwatched: Run | None,
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """What one part makes of a call, given what is inside of it."""
    if isinstance(part, PartOnLayer):
        assert isinstance(part.part, ExpertsPart)
        return part.part.compute(inputs_of(part, module, hidden_TH, index_TK, weights_TK, run))
    return part.compute(
        ExpertsInputs(
            layer=part.layer,
            geometry=part.geometry,
            module=module,
            hidden_TH=hidden_TH,
            index_TK=index_TK,
            weights_TK=weights_TK,
            run=run,
            unwatched=unwatched,
        )
    )


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
        shares_out=slot.gate is None or slot.gate.spec.shares_out,
        **on.common(slot.tracker),
    )
