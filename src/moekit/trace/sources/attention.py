"""Queries and keys of a layer's attention, through transformers' registry of attention implementations.

The implementation that was chosen still runs; it is only told what it is called with. Implementations that make no
mask a tensor (flash, flex) cannot be followed and are refused.

Legend: B rows, S positions, h query heads, g key heads, d width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moekit.errors import UnsupportedModel
from moekit.trace.attention_batch import AttentionBatch
from moekit.trace.sources.base import ForwardPass, Place, Probe, Removable

_FOLLOWED = ("sdpa", "eager")
# Who looks at which attention now; the registry's entries are replaced while anyone does.
_lookers: dict[nn.Module, list[Callable[..., None]]] = {}
_before: dict[str, Callable[..., Any] | None] = {}


def _plain(name: str, module: nn.Module) -> Callable[..., Any]:
    """The implementation that would run without us."""
    before = _before.get(name)
    if before is not None:
        return before
    # Eager attention stands in each family's own file.
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


def _followed(name: str) -> Callable[..., Any]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kw: Any,
    ) -> Any:
        for look in _lookers.get(module, ()):
            look(module, query, key, attention_mask, args, kw)
        return _plain(name, module)(module, query, key, value, attention_mask, *args, **kw)

    return forward


class _Following:
    """The registry's entries replaced, as long as any probe needs it; removed like a hook."""

    def __init__(self, modules: list[nn.Module], look: Callable[..., None]) -> None:
        self._modules, self._look = modules, look
        if not _before:
            for name in _FOLLOWED:
                _before[name] = ALL_ATTENTION_FUNCTIONS.get(name)
                ALL_ATTENTION_FUNCTIONS[name] = _followed(name)
        for module in modules:
            _lookers.setdefault(module, []).append(look)

    def remove(self) -> None:
        """Undo it."""
        for module in self._modules:
            _lookers[module].remove(self._look)
            if not _lookers[module]:
                del _lookers[module]
        self._modules = []
        if not _lookers and _before:
            for name in _FOLLOWED:
                del ALL_ATTENTION_FUNCTIONS[name]
                if name not in ALL_ATTENTION_FUNCTIONS and _before[name] is not None:
                    ALL_ATTENTION_FUNCTIONS[name] = _before[name]
            _before.clear()


class AttentionProbe(Probe):
    """What the layer's attention is called with."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._calls: list[dict[str, Any]] = []
        self._modules = [m for name, m in place.decoder.named_modules() if "att" in name.rpartition(".")[2].lower()]
        config = getattr(place.model, "config", None)
        chosen = getattr(config, "_attn_implementation", None)
        if chosen not in _FOLLOWED:
            raise UnsupportedModel(
                f"the attention implementation {chosen!r} does not show its mask",
                layer=place.index,
                hint="leave statistics of attention out (--statistics), or load the model in Python with "
                "attn_implementation='sdpa' or 'eager'",
            )

    def hooks(self) -> Iterator[Removable]:
        """In the registry that the attention modules call."""
        yield _Following(self._modules, self._look)

    def clear(self) -> None:
        """Forget the pass before."""
        self._calls.clear()

    def _look(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, args: Any, kwargs: dict[str, Any]
    ) -> None:
        if not self.active:
            return
        scaling = kwargs.get("scaling", args[0] if args else None)
        causal = kwargs.get("is_causal")
        call = {
            "query_BhSd": query.detach(),
            "key_BgSd": key.detach(),
            "mask": mask,
            "scaling": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            "causal": bool(getattr(module, "is_causal", True) if causal is None else causal),
            "sinks_h": kwargs.get("s_aux", getattr(module, "sinks", None)),
            "softcap": kwargs.get("softcap"),
        }
        if kwargs.get("position_bias") is not None:
            call["bias"] = True
        self._calls.append(call)

    def parts(self, current: ForwardPass) -> Mapping[str, Any]:
        """The call."""
        if len(self._calls) != 1:
            raise UnsupportedModel(
                f"this layer called {len(self._calls)} attentions in one forward pass, not one",
                layer=self.place.index,
                hint="leave out statistics of attention: this layer mixes tokens in another way",
            )
        call = self._calls[0]
        if call.pop("bias", False) or call["key_BgSd"].shape[2] != call["query_BhSd"].shape[2]:
            raise UnsupportedModel(
                "attention with a position bias, or to tokens of an earlier pass, cannot be followed",
                layer=self.place.index,
                hint="record without a key-value cache, or leave out statistics of attention",
            )
        if call["sinks_h"] is not None:
            call["sinks_h"] = call["sinks_h"].detach()
        real_BS = current.mask_T.view(current.shape)
        return {"attention": AttentionBatch(real_BS=real_BS, **call)}
