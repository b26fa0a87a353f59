"""Sources around the experts: router, residual stream, shared experts, block, decoder layer, any module of it.

Legend: T positions of a forward pass, N of them no padding, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.anatomy.probe import flat_output
from moekit.errors import UnsupportedModel
from moekit.trace.seam import norms_before, residual_scale, uses_sigmoid
from moekit.trace.sources.base import ForwardPass, Place, Probe, Watch
from moekit.trace.sources.table import MODULE


class RouterProbe(Probe):
    """The router's logits."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._router = place.require_moe().require_router()
        self._sigmoid = uses_sigmoid(place.require_moe())
        self._logits: Tensor | None = None

    def hooks(self) -> Iterator[RemovableHandle]:
        """On the router."""
        yield self._router.register_forward_hook(self._see)

    def clear(self) -> None:
        """Forget the logits."""
        self._logits = None

    def _see(self, module: nn.Module, args: Any, answer: Any) -> None:
        if self.active:
            self._logits = answer[0].detach()

    def parts(self, current: ForwardPass) -> Mapping[str, Any]:
        """Logits [N, E], and whether their sigmoids are the scores."""
        assert self._logits is not None  # the router ran before its experts
        logits_NE = current.keep(self._logits.reshape(-1, self._logits.shape[-1]))
        return {"logits": logits_NE, "sigmoid": self._sigmoid}


class ResidualProbe(Probe):
    """The residual stream before the block, and what the routed experts add to it."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        moe = place.require_moe()
        if moe.seam != "experts":
            raise UnsupportedModel(
                "this family's block does not call its experts alone: what they add to the residual stream is unknown",
                layer=place.index,
                hint="leave out statistics of the group 'residual'",
            )
        self._experts = moe.experts
        self._norm_modules = norms_before(place.model, moe)
        self._scale = residual_scale(place.model, moe)
        self._norms: list[tuple[Tensor, Tensor]] = []
        self._hidden: Tensor | None = None
        self._routed: Tensor | None = None

    def hooks(self) -> Iterator[RemovableHandle]:
        """On the norms, one of which makes what the experts see, and on the experts."""
        for norm in self._norm_modules:
            yield norm.register_forward_hook(self._on_norm)
        yield self._experts.register_forward_hook(self._on_experts)

    def clear(self) -> None:
        """Forget the pass before."""
        self._norms.clear()
        self._hidden, self._routed = None, None

    def _on_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.active:
            self._norms.append((args[0].detach(), output.detach()))

    def _on_experts(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.active:
            return
        self._hidden = next(a for a in args if isinstance(a, Tensor)).detach()
        self._routed = output.detach().reshape(-1, output.shape[-1])

    def parts(self, current: ForwardPass) -> Mapping[str, Any]:
        """Residual stream and routed output, [N, H] each."""
        assert self._hidden is not None
        assert self._routed is not None
        return {
            "residual": current.keep(self._residual_TH(self._hidden)),
            "routed": current.keep(self._routed) * self._scale,
        }

    def _residual_TH(self, hidden: Tensor) -> Tensor:
        for before, after in self._norms:
            if after.data_ptr() == hidden.data_ptr() and after.numel() == hidden.numel():
                return before.reshape(-1, before.shape[-1])
        raise UnsupportedModel(
            "what the experts see is no norm's output, so the residual stream before it is unknown",
            layer=self.place.index,
            hint="leave out statistics of the group 'residual'",
        )


class SharedProbe(Probe):
    """Output of the shared experts, summed."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._modules = place.require_moe().shared
        self._made: list[Tensor] = []
        if not self._modules:
            raise UnsupportedModel(
                "there is no shared expert in this layer",
                layer=place.index,
                hint="leave out statistics of shared experts",
            )

    def hooks(self) -> Iterator[RemovableHandle]:
        """On each shared expert."""
        for module in self._modules:
            yield module.register_forward_hook(self._see)

    def clear(self) -> None:
        """Forget the outputs."""
        self._made.clear()

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.active:
            self._made.append(flat_output(output).detach())

    def parts(self, current: ForwardPass) -> Mapping[str, Any]:
        """Output [N, H]."""
        return {"shared": current.keep(torch.stack(self._made).sum(0))}


class StreamProbe(Probe):
    """Residual stream after the decoder layer."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._watch = Watch(place.decoder, "the decoder layer", self)

    def hooks(self) -> Iterator[RemovableHandle]:
        """On the decoder layer."""
        yield self._watch.hook()

    def clear(self) -> None:
        """Forget the stream."""
        self._watch.clear()

    def parts(self, current: ForwardPass) -> Mapping[str, Any]:
        """The stream, [N, H]."""
        return {"stream": self._watch.pair(current)[1]}


class BlockProbe(Probe):
    """Input and output of the feed-forward block (MoE or dense) and of the whole decoder layer."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._layer = Watch(place.decoder, "the decoder layer", self)
        self._block = Watch(feed_forward(place), "the feed-forward block", self)

    def hooks(self) -> Iterator[RemovableHandle]:
        """On block and layer."""
        yield self._block.hook()
        yield self._layer.hook()

    def clear(self) -> None:
        """Forget both."""
        self._block.clear()
        self._layer.clear()

    def parts(self, current: ForwardPass) -> Mapping[str, Any]:
        """All four, [N, H] each."""
        block, layer = self._block.pair(current), self._layer.pair(current)
        names = ("block_input", "block_output", "layer_input", "stream")
        return dict(zip(names, (*block, *layer), strict=True))


class ModuleProbe(Probe):
    """Input and output of modules below the decoder layer, by their paths.

    Args:
        place: the layer.
        paths: below it, such as "self_attn".
    """

    def __init__(self, place: Place, paths: tuple[str, ...]) -> None:
        super().__init__(place)
        self._watches = {path: Watch(_submodule(place, path), path, self) for path in paths}

    def hooks(self) -> Iterator[RemovableHandle]:
        """On each module."""
        for watch in self._watches.values():
            yield watch.hook()

    def clear(self) -> None:
        """Forget the pass before."""
        for watch in self._watches.values():
            watch.clear()

    def parts(self, current: ForwardPass) -> Mapping[str, Any]:
        """Each module's (input, output)."""
        return {"modules": {path: watch.pair(current) for path, watch in self._watches.items()}}


def _submodule(place: Place, path: str) -> nn.Module:
    try:
        return place.decoder.get_submodule(path)
    except AttributeError:
        below = [name for name, module in place.decoder.named_modules() if name and name.count(".") < 2]
        raise UnsupportedModel(
            f"there is no module {path!r} in this layer",
            layer=place.index,
            hint=f"there are, among others: {', '.join(below[:12])}",
        ) from None


def feed_forward(place: Place) -> nn.Module:
    """The feed-forward block of a decoder layer: its MoE block, or the dense network in its place.

    Raises:
        UnsupportedModel: there is no child of the layer that may be it.
    """
    if place.moe is not None and place.moe.block is not place.decoder:
        return place.moe.block
    for name in ("mlp", "feed_forward", "block_sparse_moe", "ffn"):
        child = getattr(place.decoder, name, None)
        if isinstance(child, nn.Module):
            return child
    raise UnsupportedModel(
        "no part of this decoder layer is its feed-forward block alone",
        layer=place.index,
        hint=f"name the module yourself: a statistic with the source {MODULE}PATH",
    )
