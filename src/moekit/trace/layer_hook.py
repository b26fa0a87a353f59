"""A layer hook sees what one decoder layer is given and gives, without changing it.

It is an experts part that watches: it stands outside of every other part, sees what the block gives its experts, and
lets them compute. What else statistics look at is fetched by a probe for each source. Outputs of single experts are
asked for only where a statistic reads them, and only for the tokens routed to them. By default the layer's output is
left untouched, so that the routed experts are computed twice; `once` adds the single outputs up instead, and the
layer's output equals the stock one up to rounding; where another one watches further inside, that stays undone.

Legend: T positions of a forward pass, N of them no padding, K choices a token, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import holds_all_experts
from moekit.errors import BadData, UnsupportedModel
from moekit.runtime.experts import ExpertsInputs, Run, TransientPart
from moekit.runtime.hanging import lay
from moekit.trace.batch import ExpertBatch, TokenBatch
from moekit.trace.each_expert import Figures, OneExpert, delegated, each_expert, plain_expert
from moekit.trace.meta import index_dtype
from moekit.trace.seam import routed_choices
from moekit.trace.sources.all_experts import all_outputs
from moekit.trace.sources.attention import AttentionProbe
from moekit.trace.sources.base import ForwardPass, Place, Probe, Removable
from moekit.trace.sources.gradients import GradientProbe, gradient_batches
from moekit.trace.sources.streams import (
    BlockProbe,
    ModuleProbe,
    ResidualProbe,
    RouterProbe,
    SharedProbe,
    StreamProbe,
)
from moekit.trace.sources.table import MODULE
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import Statistic, sources_of

_PROBES: dict[str, type[Probe]] = {
    "logits": RouterProbe,
    "residual": ResidualProbe,
    "shared": SharedProbe,
    "stream": StreamProbe,
    "block_io": BlockProbe,
    "attention": AttentionProbe,
}
_GRADIENTS = frozenset({"gradients", "weight_gradients", "stream_gradients"})


@dataclass
class LayerBuffer:
    """What one layer showed in one pass, on its device; added up once the pass has ended well.

    Attributes:
        indices: [N, K] in the smallest type; no columns where the layer is dense.
        weights: [N, K].
        extremes: least and greatest index, int64 [2]; None without tokens or choices.
        checks: sums that are finite where all they sum is, each [].
        measured: statistics of parts of the tokens.
    """

    indices: Tensor
    weights: Tensor
    extremes: Tensor | None
    checks: list[Tensor]
    measured: list[Mapping[str, Tensor]] = field(default_factory=list)


@dataclass
class _Call:
    """What the experts were called with, padding left out."""

    hidden_NH: Tensor | None
    index_NK: Tensor
    weights_NK: Tensor
    run: Run | None = None
    figures: Figures | None = None


class LayerHook(TransientPart):
    """Sees one layer.

    Args:
        place: the layer.
        statistics: those to measure while the pass runs, because they read more than choices and weights.
        once: compute single experts' outputs once where a statistic reads them, and give their sum on.

    Raises:
        UnsupportedModel: the layer does not show what a statistic reads.
    """

    watches = True

    def __init__(self, place: Place, statistics: Sequence[Statistic], *, once: bool = False) -> None:
        self.place, self.layer, self.geometry = place, place.index, place.geometry
        self._once = once
        self.buffer: LayerBuffer | None = None
        self._entries = list(statistics)
        self._by_token = [s for s in statistics if s.of_expert is None and "all_outputs" not in s.sources]
        self._by_all = [s for s in statistics if s.of_expert is None and "all_outputs" in s.sources]
        by_expert = [s for s in statistics if s.of_expert is not None]
        self._by_gradient = [s for s in by_expert if _GRADIENTS & set(s.sources)]
        self._by_expert = [s for s in by_expert if not _GRADIENTS & set(s.sources)]
        self._sources = sources_of(statistics)
        self._runs_experts = bool(sources_of([*self._by_token, *self._by_expert]) & {"outputs", "inner"})
        self._probes = [probe(place) for name, probe in _PROBES.items() if name in self._sources]
        if paths := tuple(sorted(n.removeprefix(MODULE) for n in self._sources if n.startswith(MODULE))):
            self._probes.append(ModuleProbe(place, paths))
        self.gradients: GradientProbe | None = None
        if wanted := _GRADIENTS & self._sources:
            self.gradients = GradientProbe(place, wanted)
            self._probes.append(self.gradients)
        self._pass: ForwardPass | None = None
        self._call: _Call | None = None

    def begin(self, current: ForwardPass | None) -> None:
        """A forward pass begins, or (None) ends; what a failed one left is forgotten."""
        self._pass = current
        self.buffer, self._call = None, None
        for probe in self._probes:
            probe.active = current is not None
            probe.clear()

    def hooks(self) -> Iterator[Removable]:
        """Install what sees the layer.

        Raises:
            UnsupportedModel: a statistic runs experts one by one, but they lie on several ranks.
        """
        for probe in self._probes:
            yield from probe.hooks()
        if self.place.moe is not None:
            if (self._runs_experts or self._by_all) and not holds_all_experts(self.place.moe.experts):
                raise UnsupportedModel(
                    "the experts lie on several ranks, which would have to run each of them in step",
                    layer=self.layer,
                    hint="record outputs of single experts in one process, or leave out statistics of them",
                )
            if self._by_all and self.geometry.weighs_inputs:
                raise UnsupportedModel(
                    "weights multiply what this family's experts are given: an expert that a token did not choose has "
                    "no output for it",
                    layer=self.layer,
                    hint="leave out statistics of the outputs of all experts",
                )
            yield lay(self.place.moe, self)
        if self._entries or self.place.moe is None:
            yield self.place.decoder.register_forward_hook(self._on_decoder)

    def compute(self, inputs: ExpertsInputs) -> Tensor:
        """What the experts give, looked at."""
        given = inputs.hidden_TH, inputs.index_TK, inputs.weights_TK
        if self._pass is None:  # recomputation under activation checkpointing, say
            return inputs.run(*given)
        call = self._see(inputs)
        one = self._one(inputs.unwatched or inputs.run)
        # Who watches further inside must see the block's call.
        once = self._once and inputs.unwatched is None
        if call is not None and once and self._runs_experts and not torch.is_grad_enabled():
            return self._pass.put(self._ask(call, one, add_up=True), inputs.hidden_TH)
        self._ask(call, one)
        return inputs.run(*given)

    def _one(self, run: Run) -> OneExpert:
        return plain_expert(self.place.require_moe().experts) or delegated(run)

    def _on_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._pass is None:
            return
        if self.place.moe is None and self.buffer is None:
            none_NK = torch.zeros(self._pass.tokens, 0, dtype=torch.int64)
            self.buffer = LayerBuffer(none_NK.to(torch.uint8), none_NK.float(), None, [])
            self._call = _Call(None, none_NK, none_NK.float())
        if self.gradients is None:
            self.measure()

    def _see(self, inputs: ExpertsInputs) -> _Call | None:
        hidden_TH, weights_TK = inputs.hidden_TH.detach(), inputs.weights_TK.detach()
        index_TK = routed_choices(self.place.require_moe(), inputs.index_TK, weights_TK)
        assert self._pass is not None
        if self.buffer is not None or index_TK.shape[0] != self._pass.positions:
            what = "twice" if self.buffer is not None else f"on {index_TK.shape[0]} positions"
            raise UnsupportedModel(
                f"the experts ran {what} in a forward pass of {self._pass.positions} positions",
                layer=self.place.index,
                hint="tokens can be told apart only where each MoE layer sees all positions of a pass, once",
            )
        index_NK, weights_NK = self._pass.keep(index_TK), self._pass.keep(weights_TK)
        small_NK = index_NK.to(index_dtype(self.place.geometry.experts))
        if not self._pass.tokens:
            self.buffer = LayerBuffer(small_NK, weights_NK, None, [])
            return None
        extremes = torch.stack(torch.aminmax(index_NK)).long()
        self.buffer = LayerBuffer(small_NK, weights_NK, extremes, [weights_NK.sum(dtype=torch.float32)])
        if self._entries:
            self._call = _Call(self._pass.keep(hidden_TH), index_NK.long(), weights_NK, inputs.unwatched or inputs.run)
        return self._call

    def _empty(self, entries: Sequence[Statistic], device: torch.device) -> LayerStatistics:
        assert self._pass is not None
        geometry = self.place.geometry
        return LayerStatistics.empty(
            entries, geometry.experts, geometry.hidden, self._pass.domains, width=geometry.width, device=str(device)
        )

    @torch.no_grad()
    def _ask(self, call: _Call | None, one: OneExpert, *, add_up: bool = False) -> Tensor | None:
        """Look at what each expert sees; run the experts one by one where only that shows what is read."""
        if call is None or not (self._runs_experts or self._by_expert):
            return None
        geometry = self.place.geometry
        assert self.buffer is not None
        assert call.hidden_NH is not None
        if int(call.index_NK.min()) < 0 or int(call.index_NK.max()) > geometry.experts:
            raise BadData(f"the router chose an expert outside 0..{geometry.experts}", layer=self.place.index)
        kept = self._empty(self._by_expert, call.index_NK.device)

        def look(batch: ExpertBatch) -> None:
            if "inner" in self._sources and batch.inner is None:
                kind = type(self.place.require_moe().experts).__name__
                raise UnsupportedModel(
                    f"{kind} does not show the inputs of its down projections",
                    layer=self.place.index,
                    hint="load the model unquantized, in one process, or leave out statistics of 'inner'",
                )
            kept.add_expert_batch(batch, self._by_expert)

        call.figures = each_expert(
            one if self._runs_experts else None,
            call.hidden_NH,
            call.index_NK,
            call.weights_NK,
            geometry.experts,
            look=look if self._by_expert else None,
            peaks="outputs" in self._sources and any(s.rule == "peak" for s in self._by_token),
            add_up=add_up,
            weighs_inputs=geometry.weighs_inputs,
        )
        self.buffer.measured.append(dict(kept))
        return call.figures.output_NH

    @torch.no_grad()
    def measure(self) -> None:
        """Measure what the pass showed; with gradients, once the loss has been differentiated."""
        call, current = self._call, self._pass
        self._call = None
        if call is None or current is None or self.buffer is None or not current.tokens:
            return
        if self._by_token or self._by_all:
            self._measure_tokens(call, current, self.buffer)
        if self._by_gradient and self.gradients is not None:
            kept = self._empty(self._by_gradient, call.index_NK.device)
            assert call.hidden_NH is not None
            for batch in gradient_batches(self.gradients, current, call.hidden_NH, call.index_NK, call.weights_NK):
                kept.add_expert_batch(batch, self._by_gradient)
            self.buffer.measured.append(dict(kept))

    def _measure_tokens(self, call: _Call, current: ForwardPass, buffer: LayerBuffer) -> None:
        parts: dict[str, Any] = {"hidden": call.hidden_NH, "weights": call.weights_NK}
        for probe in self._probes:
            parts.update(probe.parts(current))
        if "logits" in parts:
            # -inf is legal: a router may forbid experts so. NaN and +inf are not.
            buffer.checks.append(parts["logits"].clamp_min(-1.0).sum(dtype=torch.float32))
        if call.figures is not None and self._runs_experts:
            parts["norms"], parts["peaks"] = call.figures.norm_NK, call.figures.peaks
        seen = TokenBatch(
            self.place.geometry.experts,
            call.index_NK,
            domains=len(current.domains),
            domain=current.labels.domain_N,
            position=current.labels.position_N,
            weighs_inputs=self.place.geometry.weighs_inputs,
            **parts,
        )
        buffer.measured.append(self._empty([], call.index_NK.device).measure(seen, self._by_token))
        if self._by_all:
            assert call.run is not None
            kept = self._empty(self._by_all, call.index_NK.device)
            for chunk in all_outputs(self._one(call.run), seen):
                kept.add(kept.measure(chunk, self._by_all))
            buffer.measured.append(dict(kept))
