"""Where massive activations are in the residual stream, layer by layer, dense layers too, and which block makes them.

One streamed pass takes what `find_super_experts` reads at the MoE layers, and the same of the residual stream at the
dense ones, whose blocks may make massive activations as well.

Legend: T positions, N of them no padding, H hidden, E experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moekit.anatomy.probe import flat_output
from moekit.diagnose.super_experts.finding import forms_massive
from moekit.diagnose.super_experts.magnitudes import is_massive, median_magnitude
from moekit.diagnose.super_experts.report import SHARED
from moekit.errors import NumericFault
from moekit.streaming.passes import Passes
from moekit.trace.batch import TokenBatch
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Change, Streamed
from moekit.trace.vocabulary import get

__all__ = ["LayerStream", "Origin", "StreamedProfile", "layer_streams"]

# What is taken of a layer's residual stream.
_OF_STREAM = ("stream_peak", "stream_gain", "stream_magnitude")
Origin = Literal["routed", "shared", "experts", "dense", "layer", "attention", "passed on", ""]


class LayerStream(BaseModel):
    """The residual stream after one decoder layer.

    Attributes:
        layer: its index.
        kind: whether it holds routed experts.
        value: largest |value|.
        channel: where that is.
        position: of its token in its sequence.
        median: of all |values|.
        gain: most that the block (experts, or dense feed-forward network) adds to one value's magnitude.
        gain_channel: where it adds that.
        gain_position: at which position.
        massive: whether the largest value is massive: above 100 and above 1,000 medians.
        origin: what makes it: "routed" or "shared" where the largest |output| at that channel is such an expert's,
            "experts" where no expert's largest output lies there (several add up), "dense" for a feed-forward network,
            "layer" for a dense layer whose parts cannot be told apart, "attention" where the block adds none of it,
            "passed on" from the layer below; "" where nothing is massive.
        expert: the expert, -1 for shared ones; None where it is no single expert.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = Field(ge=0)
    kind: Literal["moe", "dense"]
    value: float
    channel: int
    position: int
    median: float
    gain: float
    gain_channel: int
    gain_position: int
    massive: bool
    origin: Origin
    expert: int | None = None


class StreamedProfile(Streamed):
    """A text on its way through a checkpoint; dense layers' residual streams are booked as well.

    Args:
        *given: of `Streamed`.
        moe_layers: decoder layers that hold routed experts.
        **options: of `Streamed`.

    Attributes:
        dense: decoder layer -> statistics of the residual stream, of layers without routed experts.
        apart: dense layers whose feed-forward network could be told from their attention.
    """

    def __init__(self, *given: Any, moe_layers: Collection[int], **options: Any) -> None:
        super().__init__(*given, **options)
        self.moe_layers = frozenset(moe_layers)
        self.dense: dict[int, LayerStatistics] = {}
        self.apart: set[int] = set()

    def _layer(self, index: int, passes: Passes, change: Change | None) -> None:
        if index in self.moe_layers:
            super()._layer(index, passes, change)
            return
        entries = [get(name) for name in _OF_STREAM]
        stats = LayerStatistics.empty(entries, 1, self.walk.hidden, self.domains)
        watch = _DenseWatch(self, stats)
        with watch.watching(self.loader.layer(index)):
            super()._layer(index, passes, change)
        self.dense[index] = stats
        if watch.apart:
            self.apart.add(index)
        if self.folder is not None:
            told = {"tokens": str(stats.tokens), "apart": str(int(watch.apart))}
            save_file({n: t.contiguous() for n, t in stats.items()}, self._file(index), metadata=told)

    def _resume(self, key: str) -> int:
        from safetensors import safe_open

        done = super()._resume(key)
        for index in (n for n in range(done + 1) if n not in self.moe_layers):
            if not self._file(index).is_file():
                self.records.clear()
                return -1
            with safe_open(self._file(index), framework="pt") as opened:
                about = opened.metadata()
            values = load_file(self._file(index))
            self.dense[index] = LayerStatistics(1, self.walk.hidden, self.domains, int(about["tokens"]), values)
            if about["apart"] == "1":
                self.apart.add(index)
        return done

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"dense-{index}.safetensors"


class _DenseWatch:
    """Sees one dense decoder layer: what it makes, and the residual stream its feed-forward network adds to."""

    def __init__(self, streamed: Streamed, stats: LayerStatistics) -> None:
        self.apart = True
        self._passes = iter(streamed.passes)
        self._hidden = streamed.walk.hidden
        self._stats = stats
        self._norms: list[tuple[Tensor, Tensor]] = []
        self._blocks: list[Tensor] = []

    @contextlib.contextmanager
    def watching(self, decoder: nn.Module) -> Iterator[None]:
        handles = [decoder.register_forward_hook(self._on_decoder, with_kwargs=True)]
        for child in decoder.children():
            own = list(child.parameters())
            if own and all(p.dim() == 1 and p.shape[0] == self._hidden for p in own):
                handles.append(child.register_forward_hook(self._on_norm))
            elif own:
                handles.append(child.register_forward_pre_hook(self._on_block, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        self._norms.append((args[0], output))

    def _on_block(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if given is not None:
            self._blocks.append(given)

    def _on_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        current = next(self._passes)
        made = flat_output(output)
        given = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        residual = self._residual()
        if residual is None:
            self.apart, residual = False, given
        self._norms.clear()
        self._blocks.clear()
        stream_NH, residual_NH = (current.keep(t.detach().reshape(-1, t.shape[-1])) for t in (made, residual))
        none_NK = torch.zeros(len(stream_NH), 1, dtype=torch.int64, device=stream_NH.device)
        position_N = current.labels.position_N
        self._stats.update(TokenBatch(1, none_NK, position=position_N, residual=residual_NH, stream=stream_NH))

    def _residual(self) -> Tensor | None:
        """What the norm before the last block was given: the residual stream with attention's part in it."""
        if len(self._blocks) < 2:  # attention, then the network
            return None
        last = self._blocks[-1]
        return next((given for given, made in self._norms if made.data_ptr() == last.data_ptr()), None)


def layer_streams(
    moe: Mapping[int, LayerStatistics], dense: Mapping[int, LayerStatistics], apart: Collection[int] = ()
) -> tuple[LayerStream, ...]:
    """The residual stream layer by layer, and what makes each massive activation.

    Args:
        moe: decoder layer -> what `find_super_experts` reads.
        dense: decoder layer -> `stream_peak`, `stream_gain`, `stream_magnitude`, of layers without routed experts.
        apart: dense layers whose gain is that of the feed-forward network alone; of the others it is the layer's.

    Raises:
        NumericFault: a value is infinite.
    """
    found: list[LayerStream] = []
    for index, stats in sorted({**dense, **moe}.items()):
        value, channel, position = stats["stream_peak"].tolist()
        if not math.isfinite(value):
            raise NumericFault(
                f"the residual stream holds {value}", layer=index, hint="run in a wider type (--dtype float32)"
            )
        gain, gain_channel, gain_position = stats["stream_gain"].tolist()
        median = median_magnitude(stats["stream_magnitude"])
        massive = bool(is_massive(torch.tensor(value), median))
        origin: Origin = ""
        expert: int | None = None
        if massive and not forms_massive(gain, median):
            origin = "passed on" if found and found[-1].massive else "attention"
        elif massive and index in moe:
            origin, expert = _maker(stats, int(gain_channel))
        elif massive:
            origin = "dense" if index in apart else "layer"
        told = LayerStream(
            layer=index,
            kind="moe" if index in moe else "dense",
            value=value,
            channel=int(channel),
            position=int(position),
            median=median,
            gain=gain,
            gain_channel=int(gain_channel),
            gain_position=int(gain_position),
            massive=massive,
            origin=origin,
            expert=expert,
        )
        found.append(told)
    return tuple(found)


def _maker(stats: LayerStatistics, channel: int) -> tuple[Origin, int | None]:
    """The experts whose largest |output| lies at a channel: the one with the largest."""
    rows = list(enumerate(stats["output_peak"].tolist()))
    if "shared_peak" in stats:
        rows.append((SHARED, stats["shared_peak"].tolist()))
    there = [(peak[0], expert) for expert, peak in rows if int(peak[1]) == channel]
    if not there:
        return "experts", None
    _, expert = max(there, key=lambda pair: (pair[0], -pair[1]))
    return ("shared" if expert == SHARED else "routed"), expert
