"""Begins and ends forward passes: one hook before the base model, one after it, one on each layer's attention.

Legend: B sequences, S positions.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.errors import BadConfig, UnsupportedModel
from moekit.runtime.cache import PartCache
from moekit.runtime.context import ForwardContext

if TYPE_CHECKING:
    from moekit.runtime.attention import BlockAttention

# Passes whose layers may still be repeated: with activation checkpointing each keeps what its layers left.
KEPT_PASSES = 4


class PassTracker:
    """Knows the forward pass under way, and which earlier one a repeated layer belongs to.

    Attributes:
        layers: decoder layers that are MoE, in order.
        attention: each layer's attention module, where there is one.
        share: factor on losses of parts: one over the micro-batches of an optimizer step.
        step: optimizer step under way.
        steps: optimizer steps of the run.
        losses: (layer, name) -> loss of a part in the latest training pass.
        repeating: whether a layer runs again for the backward pass.
    """

    def __init__(self, layers: tuple[int, ...], attention: dict[int, nn.Module]) -> None:
        self.layers = layers
        self.attention = attention
        self.share, self.step, self.steps = 1.0, 0, 0
        self.rows: Mapping[str, Tensor] = {}
        self.handles: list[RemovableHandle] = []
        self.losses: dict[tuple[int, str], Tensor] = {}
        self._passes = 0
        self._forget()

    def _forget(self) -> None:
        self._current: ForwardContext | None = None
        self._repeated: ForwardContext | None = None
        self._call: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        self._kept: deque[ForwardContext] = deque(maxlen=KEPT_PASSES)
        self._caches: WeakKeyDictionary[Any, PartCache] = WeakKeyDictionary()
        self.losses = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the model takes along: nothing of passes under way."""
        transient = ("_current", "_repeated", "_call", "_kept", "_caches", "losses")
        return {name: value for name, value in vars(self).items() if name not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def repeating(self) -> bool:
        """Whether a layer runs again for the backward pass."""
        return self._current is None

    def install(self, base: nn.Module) -> None:
        """Hook the base model and the attention of each layer."""
        self.handles = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, always_call=True),
        ]
        for module in self.attention.values():
            self.handles.append(module.register_forward_pre_hook(self._attending, with_kwargs=True))

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._forget()

    def current(self, layer: int) -> ForwardContext:
        """The pass that a layer runs in.

        Raises:
            UnsupportedModel: none (the layer was called by itself), or one that reentrant checkpointing takes apart.
        """
        context = self._current
        if context is not None:
            if context.armed and not torch.is_grad_enabled():
                raise UnsupportedModel(
                    "a part reads the forward pass around it, but the layer runs without a graph (reentrant activation "
                    "checkpointing): gradients would be wrong",
                    layer=layer,
                    hint='checkpoint with gradient_checkpointing_kwargs={"use_reentrant": False}',
                )
            return context
        if not torch.is_grad_enabled():
            raise UnsupportedModel(
                "a part reads the forward pass around it, but its layer was called by itself",
                layer=layer,
                hint="call the whole model",
            )
        if layer not in self.attention:
            if len(self._kept) == 1:
                return self._kept[0]
        elif self._repeated is not None:
            return self._repeated
        raise UnsupportedModel(
            "a layer is repeated for the backward pass of a forward pass that is not known any more",
            layer=layer,
            hint=f"run the backward pass before {KEPT_PASSES} more forward passes",
        )

    def attention_of(self, layer: int) -> BlockAttention:
        """See `ForwardContext.attention`."""
        from moekit.runtime.attention import BlockAttention

        context = self.current(layer)
        if self._call is None or self._call[0] != layer:
            raise UnsupportedModel("no attention ran before the MoE block of this decoder layer", layer=layer)
        return BlockAttention(self.attention[layer], context, layer, *self._call[1:])

    def _begin(self, base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = dict(zip(list(inspect.signature(base.forward).parameters), args, strict=False)) | dict(kwargs)
        ids = given.get("input_ids")
        if ids is None and not isinstance(given.get("inputs_embeds"), Tensor):
            return
        like: Tensor = ids if ids is not None else given["inputs_embeds"]
        past_key_values = given.get("past_key_values")
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        armed = base.training and torch.is_grad_enabled()
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        batch, length = like.shape[:2]
        for name, value in self.rows.items():
            if value.shape[0] != batch:
                raise BadConfig(f"the override {name!r} is for {value.shape[0]} sequences, the batch has {batch}")
        if armed:
            self.losses = {}
        self._current = ForwardContext(
            tracker=self,
            number=self._passes,
            batch=batch,
            length=length,
            past=past,
            training=base.training,
            armed=armed,
            input_ids=ids,
            attention_mask=mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None,
            position_ids=positions if isinstance(positions, Tensor) and positions.dim() == 2 else None,
            layers=self.layers,
            rows=self.rows,
            step=self.step,
            steps=self.steps,
            cache=self._cache_for(past_key_values, past, armed, given.get("use_cache")),
        )
        self._passes += 1

    def _cache_for(self, past_key_values: Any, past: int, armed: bool, use_cache: Any) -> PartCache | None:
        if armed or use_cache is False:
            return None
        if past_key_values is None:
            return PartCache()
        return self._caches.get(past_key_values) or (PartCache() if not past else None)

    def _end(self, base: nn.Module, args: Any, output: Any) -> None:
        context, self._current = self._current, None
        self._call = None
        if context is None:
            return
        past_key_values = getattr(output, "past_key_values", None)
        if context.cache is not None and past_key_values is not None and past_key_values not in self._caches:
            self._caches[past_key_values] = context.cache
            context.cache.follow(past_key_values)
        if context.armed:
            checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
            if not checkpointed:
                self._kept.clear()
            self._kept.append(context)

    def _attending(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        layer = next(index for index, known in self.attention.items() if known is module)
        marks = _marks(args, kwargs)
        # Only the latest call: what it holds is a whole layer's input.
        self._call = (layer, args, dict(kwargs))
        if self._current is not None:
            self._current._marks[layer] = marks
            self._repeated = None
        elif torch.is_grad_enabled():
            self._repeated = next((c for c in self._kept if _same(c._marks.get(layer, ()), marks)), None)


def _marks(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The tensors that a call is given beside hidden states, which a repetition computes anew."""
    found: list[Tensor] = []
    for name, value in (*((str(n), v) for n, v in enumerate(args)), *sorted(kwargs.items())):
        if name not in ("0", "hidden_states"):
            inner = value if isinstance(value, tuple | list) else (value,)
            found += [tensor for tensor in inner if isinstance(tensor, Tensor)]
    return tuple(found)


def _same(known: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> bool:
    return bool(known) and len(known) == len(given) and all(a is b for a, b in zip(known, given, strict=True))


@contextlib.contextmanager
def rows(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Override something of a part for each sequence of the batches run inside.

    Args:
        model: with parts attached.
        values: name -> [B, ...]; which names a part reads, its docstring says.

    Raises:
        BadConfig: no part is attached.
    """
    tracker = tracker_of(model)
    if tracker is None:
        raise BadConfig("no part is attached that could read an override", hint="attach it first")
    before, tracker.rows = tracker.rows, dict(values)
    try:
        yield
    finally:
        tracker.rows = before


def set_step(model: nn.Module, *, step: int, steps: int, share: float) -> None:
    """Tell parts how far training is, and by how much a micro-batch's losses count; nothing without parts."""
    tracker = tracker_of(model)
    if tracker is not None:
        tracker.step, tracker.steps, tracker.share = step, steps, share


def tracker_of(model: nn.Module) -> PassTracker | None:
    """The tracker of a model with parts; None without."""
    from moekit.runtime.slots import slots_in

    return next((slot.tracker for _, slot in slots_in(model) if slot.tracker is not None), None)
