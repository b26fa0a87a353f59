"""A hook sees what one MoE layer is given and gives, without changing it.

It sits on the experts module as a forward hook, or as an experts implementation registered with transformers that
delegates to the one chosen before. Outputs of single experts are asked for only where a statistic reads them, and only
for the tokens routed to them. Hooks leave the layer's output untouched and so compute the routed experts twice; an
implementation adds the single outputs up itself, and the layer's output equals the stock one up to rounding.

Legend: T positions of a forward pass, N of them no padding, K choices a token, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.anatomy.probe import MoELayer, flat_output
from moekit.errors import BadData, UnsupportedModel
from moekit.trace.batch import ExpertBatch, TokenBatch
from moekit.trace.each_expert import Figures, OneExpert, delegated, each_expert, plain_expert
from moekit.trace.meta import index_dtype
from moekit.trace.rows import Rows
from moekit.trace.seam import (
    Experts,
    decoder_layer,
    norms_before,
    read_arguments,
    residual_scale,
    uses_sigmoid,
)
from moekit.trace.statistics import LayerStatistics
from moekit.trace.tokens import TokenLabels
from moekit.trace.vocabulary import Source, Statistic, sources_of


class ForwardPass:
    """The forward pass under way.

    Attributes:
        mask_T: False at padding.
        positions: T.
        tokens: N.
        labels: of the N tokens, on the CPU.
        domains: names of the domains known so far.
    """

    def __init__(self, rows: Rows, domains: Sequence[str]) -> None:
        self.mask_T = rows.mask_BS.flatten()
        self.positions = self.mask_T.numel()
        self.labels: TokenLabels = rows.labels()
        self.tokens = len(self.labels)
        self.domains = tuple(domains)
        self._kept = rows.kept()
        self._on: dict[torch.device, Tensor] = {}

    def keep(self, values: Tensor) -> Tensor:
        """Rows of the N tokens among those of T positions; copied to a device once a pass."""
        if self._kept is None:
            return values
        if values.device not in self._on:
            self._on[values.device] = self._kept.to(values.device)
        return values.index_select(0, self._on[values.device])

    def put(self, values: Tensor | None, like_TH: Tensor) -> Tensor:
        """Inverse of `keep`: rows of the N tokens among T positions, zeros at padding."""
        assert values is not None
        if self._kept is None:
            return values
        return torch.zeros_like(like_TH).index_copy_(0, self._kept.to(values.device), values)


@dataclass
class LayerBuffer:
    """What one layer showed in one pass, on its device; added up once the pass has ended well.

    Attributes:
        indices: [N, K] in the smallest type.
        weights: [N, K].
        extremes: least and greatest index, int64 [2]; None without tokens.
        checks: sums that are finite where all they sum is, each [].
        measured: statistics of parts of the tokens.
    """

    indices: Tensor
    weights: Tensor
    extremes: Tensor | None
    checks: list[Tensor]
    measured: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass
class _Call:
    """What one layer showed in this pass so far: all positions, then tokens only."""

    hidden_TH: Tensor
    hidden_NH: Tensor
    index_NK: Tensor
    weights_NK: Tensor
    figures: Figures | None = None
    routed_TH: Tensor | None = None
    shared_TH: Tensor | None = None


class LayerHook:
    """Sees one layer.

    Args:
        model: the model, for what stands around the layer.
        layer: the layer.
        statistics: those to measure while the pass runs, because they read more than choices and weights.
    """

    def __init__(self, model: nn.Module, layer: MoELayer, statistics: Sequence[Statistic]) -> None:
        self.layer = layer
        self.buffer: LayerBuffer | None = None
        self._by_token = [s for s in statistics if s.of_expert is None]
        self._by_expert = [s for s in statistics if s.of_expert is not None]
        self._sources: frozenset[Source] = sources_of(statistics)
        self._decoder = decoder_layer(model, layer) if self._sources & {"stream", "shared"} else None
        self._norm_modules = norms_before(model, layer) if "residual" in self._sources else []
        self._scale = residual_scale(model, layer) if "residual" in self._sources else 1.0
        self._sigmoid = "logits" in self._sources and uses_sigmoid(layer)
        self._one_by_one = bool(self._sources & {"outputs", "inner"})
        if "shared" in self._sources and not layer.shared:
            raise UnsupportedModel(
                "there is no shared expert in this layer",
                layer=layer.index,
                hint="leave out statistics of shared experts",
            )
        self._pass: ForwardPass | None = None
        self._call: _Call | None = None
        self._logits: Tensor | None = None
        self._shared: list[Tensor] = []
        self._norms: list[tuple[Tensor, Tensor]] = []

    def begin(self, current: ForwardPass | None) -> None:
        """A forward pass begins, or (None) ends; what a failed one left is forgotten."""
        self._pass = current
        self.buffer, self._call, self._logits = None, None, None
        self._norms.clear()
        self._shared.clear()

    def hooks(self, *, on_experts: bool) -> Iterator[RemovableHandle]:
        """Install the hooks; `on_experts` False where the experts implementation sees the calls."""
        experts = self.layer.experts
        if "logits" in self._sources:
            yield self.layer.require_router().register_forward_hook(self._on_router)
        for norm in self._norm_modules:
            yield norm.register_forward_hook(self._on_norm)
        if on_experts:
            yield experts.register_forward_pre_hook(self._on_experts, with_kwargs=True)
        if "residual" in self._sources:
            yield experts.register_forward_hook(self._on_output)
        if "shared" in self._sources:
            for module in self.layer.shared:
                yield module.register_forward_hook(self._on_shared)
        if self._decoder is not None:
            yield self._decoder.register_forward_hook(self._on_decoder)

    def implementation(self, chosen: Experts) -> Experts:
        """The experts' forward that records and delegates to `chosen`."""
        one = plain_expert(self.layer.experts) or delegated(chosen)

        def forward(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
            if self._pass is None:
                return chosen(hidden_TH, index_TK, weights_TK)
            call = self._see(hidden_TH.detach(), index_TK, weights_TK.detach())
            if call is None or not self._one_by_one or torch.is_grad_enabled():
                if call is not None and self._one_by_one:
                    self._ask(call, plain_expert(self.layer.experts) or delegated(chosen))
                output_TH = chosen(hidden_TH, index_TK, weights_TK)
            else:
                output_TH = self._pass.put(self._ask(call, one, add_up=True), hidden_TH)
            if call is not None and "residual" not in self._sources and self._decoder is None:
                self._measure()
            return output_TH

        return forward

    def _on_router(self, module: nn.Module, args: Any, answer: Any) -> None:
        if self._pass is not None:
            self._logits = answer[0].detach()

    def _on_norm(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._pass is not None:
            self._norms.append((args[0].detach(), output.detach()))

    def _on_experts(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._pass is None:  # recomputation under activation checkpointing, say
            return
        hidden_TH, index_TK, weights_TK = read_arguments(self.layer, args, kwargs)
        call = self._see(hidden_TH.detach(), index_TK, weights_TK.detach())
        if call is None:
            return
        if self._one_by_one:
            # `forward`, not the module itself, whose hooks would see this call
            self._ask(call, plain_expert(self.layer.experts) or delegated(self.layer.experts.forward))
        if "residual" not in self._sources and self._decoder is None:
            self._measure()

    def _on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._pass is not None and self._call is not None:
            self._call.routed_TH = output.detach()
            if self._decoder is None:
                self._measure()

    def _on_shared(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._pass is not None:
            self._shared.append(flat_output(output).detach())

    def _on_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._pass is not None and self._call is not None:
            self._measure(stream_TH=flat_output(output).detach())

    def _see(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> _Call | None:
        assert self._pass is not None
        if self.buffer is not None or index_TK.shape[0] != self._pass.positions:
            what = "twice" if self.buffer is not None else f"on {index_TK.shape[0]} positions"
            raise UnsupportedModel(
                f"the experts ran {what} in a forward pass of {self._pass.positions} positions",
                layer=self.layer.index,
                hint="tokens can be told apart only where each MoE layer sees all positions of a pass, once",
            )
        index_NK, weights_NK = self._pass.keep(index_TK), self._pass.keep(weights_TK)
        small_NK = index_NK.to(index_dtype(self.layer.geometry.experts))
        if not self._pass.tokens:
            self.buffer = LayerBuffer(small_NK, weights_NK, None, [])
            return None
        extremes = torch.stack(torch.aminmax(index_NK)).long()
        self.buffer = LayerBuffer(small_NK, weights_NK, extremes, [weights_NK.sum(dtype=torch.float32)])
        if self._by_token or self._by_expert:
            self._call = _Call(hidden_TH, self._pass.keep(hidden_TH), index_NK.long(), weights_NK)
        return self._call

    @torch.no_grad()
    def _ask(self, call: _Call, one: OneExpert, *, add_up: bool = False) -> Tensor | None:
        """Run the experts one by one; what only they show is measured on the way."""
        geometry = self.layer.geometry
        assert self._pass is not None
        assert self.buffer is not None
        index_NK = call.index_NK
        if int(index_NK.min()) < 0 or int(index_NK.max()) > geometry.experts:
            raise BadData(f"the router chose an expert outside 0..{geometry.experts}", layer=self.layer.index)
        kept: LayerStatistics | None = None
        if self._by_expert:
            kept = LayerStatistics.empty(
                self._by_expert,
                geometry.experts,
                geometry.hidden,
                self._pass.domains,
                width=geometry.width,
                device=str(index_NK.device),
            )

        def look(batch: ExpertBatch) -> None:
            if "inner" in self._sources and batch.inner is None:
                raise UnsupportedModel(
                    f"{type(self.layer.experts).__name__} does not show the inputs of its down projections",
                    layer=self.layer.index,
                    hint="load the model unquantized, in one process, or leave out statistics of 'inner'",
                )
            assert kept is not None
            kept.add_expert_batch(batch, self._by_expert)

        call.figures = each_expert(
            one,
            call.hidden_NH,
            index_NK,
            call.weights_NK,
            geometry.experts,
            look=look if kept is not None else None,
            peaks="outputs" in self._sources and any(s.rule == "peak" for s in self._by_token),
            add_up=add_up,
        )
        if kept is not None:
            self.buffer.measured.append(dict(kept))
        return call.figures.output_NH

    def _residual_TH(self, hidden_TH: Tensor) -> Tensor:
        for before, after in self._norms:
            if after.data_ptr() == hidden_TH.data_ptr() and after.numel() == hidden_TH.numel():
                return before.reshape(-1, before.shape[-1])
        raise UnsupportedModel(
            "what the experts see is no norm's output, so the residual stream before it is unknown",
            layer=self.layer.index,
            hint="leave out statistics of the group 'residual'",
        )

    @torch.no_grad()
    def _measure(self, stream_TH: Tensor | None = None) -> None:
        call, self._call = self._call, None
        if call is None or self._pass is None or self.buffer is None or not self._by_token:
            return
        parts: dict[str, Any] = {"hidden": call.hidden_NH, "weights": call.weights_NK}
        if "logits" in self._sources:
            assert self._logits is not None  # the router ran before its experts
            parts["logits"] = self._pass.keep(self._logits.reshape(-1, self._logits.shape[-1]))
            # -inf is legal: a router may forbid experts so. NaN and +inf are not.
            self.buffer.checks.append(parts["logits"].clamp_min(-1.0).sum(dtype=torch.float32))
        if "residual" in self._sources:
            assert call.routed_TH is not None
            parts["residual"] = self._pass.keep(self._residual_TH(call.hidden_TH))
            parts["routed"] = self._pass.keep(call.routed_TH) * self._scale
        if call.figures is not None:
            parts["norms"] = call.figures.norm_NK
            parts["peaks"] = call.figures.peaks
        if "shared" in self._sources:
            parts["shared"] = self._pass.keep(torch.stack(self._shared).sum(0))
        if stream_TH is not None:
            parts["stream"] = self._pass.keep(stream_TH)
        geometry = self.layer.geometry
        seen = TokenBatch(
            geometry.experts,
            call.index_NK,
            domains=len(self._pass.domains),
            domain=self._pass.labels.domain_N,
            position=self._pass.labels.position_N,
            sigmoid=self._sigmoid,
            **parts,
        )
        stats = LayerStatistics(geometry.experts, geometry.hidden, self._pass.domains, width=geometry.width)
        self.buffer.measured.append(stats.measure(seen, self._by_token))
