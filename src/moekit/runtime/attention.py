"""A block's attention, asked again to mix other values by it.

The attention module is run once more on what it was given, with an implementation that keeps queries and keys and stops
there: no family's projections, norms or rotary embeddings are written twice. Mixing is a second call of the model's own
implementation with other values, so that windows, sinks and grouped keys are as in the model.

Legend: B sequences, S positions of this pass, L positions so far, N query heads, D head width, C channels to mix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moekit.errors import UnsupportedModel
from moekit.runtime.context import ForwardContext

_CAPTURE = "moekit_capture"


class _Captured(Exception):
    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.query, self.key, self.mask, self.options = query, key, mask, options


class _Filled:
    """A key-value cache that this pass has written already: it gives what it holds, and takes nothing."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions."""
        layer = self._cache.layers[layer_idx]
        return layer.keys, layer.values


def _capture(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    raise _Captured(query, key, attention_mask, options)


ALL_ATTENTION_FUNCTIONS.register(_CAPTURE, _capture)


@dataclass(eq=False)
class BlockAttention:
    """The attention of one layer in one pass; queries and keys are computed when first asked for."""

    module: nn.Module
    context: ForwardContext
    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    _found: _Captured | None = None

    def _ask(self) -> _Captured:
        if self._found is None:
            config: Any = getattr(self.module, "config", None)
            if config is None:
                raise UnsupportedModel("the attention of this layer has no config to choose by", layer=self.layer)
            kwargs = dict(self.kwargs)
            if kwargs.get("past_key_values") is not None:
                kwargs["past_key_values"] = _Filled(kwargs["past_key_values"])
            before = config._attn_implementation
            config._attn_implementation = _CAPTURE
            try:
                # `forward`, not the module itself, whose hooks would see this call.
                self.module.forward(*self.args, **kwargs)
            except _Captured as found:
                self._found = found
            finally:
                config._attn_implementation = before
        if self._found is None:
            raise UnsupportedModel(
                f"{type(self.module).__name__} does not go through transformers' attention interface", layer=self.layer
            )
        return self._found

    @property
    def query(self) -> Tensor:
        """[B, N, S, D], rotated."""
        return self._ask().query

    @property
    def key(self) -> Tensor:
        """[B, key heads, L, D], rotated; earlier positions from the key-value cache."""
        key = self._ask().key
        if key.shape[2] != self.context.past + self.context.length:
            raise UnsupportedModel(
                "the key-value cache does not hold every position (a sliding window, say)",
                layer=self.layer,
                hint="run without a cache (use_cache=False)",
            )
        return key

    def mix(self, values: Tensor) -> Tensor:
        """Values of all positions averaged by attention, mean over heads: [B, L, C] -> [B, S, C].

        Args:
            values: one row a position so far; see `ForwardContext.extend`.
        """
        found, key = self._ask(), self.key
        config: Any = self.module.config
        name: str = config._attn_implementation
        if name not in ("eager", "sdpa"):
            raise UnsupportedModel(
                f"values of another width cannot be mixed by {name!r} attention",
                layer=self.layer,
                hint='load the model with attn_implementation="sdpa"',
            )
        heads_BNLC = values.to(key.dtype).unsqueeze(1).expand(-1, key.shape[1], -1, -1).contiguous()
        mixed_BSNC, _ = _interface(self.module, name)(
            self.module, found.query, key, heads_BNLC, found.mask, **{**found.options, "dropout": 0.0}
        )
        return mixed_BSNC.mean(dim=2).to(values.dtype)


def _interface(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that the module would call: a family's own eager one stands beside its class."""
    if name != "eager":
        function: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[name]
        return function
    stock = getattr(type(module), "stock_class", type(module))
    import sys

    eager: Callable[..., tuple[Tensor, Any]] = vars(sys.modules[stock.__module__])["eager_attention_forward"]
    return eager


def attention_modules(model: nn.Module, blocks: dict[int, str]) -> dict[int, nn.Module]:
    """The attention beside each MoE block: the child of its decoder layer that is called so.

    Args:
        model: the model.
        blocks: decoder layer -> path of its MoE block.
    """
    found = {}
    for layer, path in blocks.items():
        parent = model.get_submodule(path.rpartition(".")[0]) if "." in path else model
        for name, child in parent.named_children():
            if ("attn" in name or "attention" in name) and not name.endswith("norm"):
                found[layer] = child
                break
    return found
