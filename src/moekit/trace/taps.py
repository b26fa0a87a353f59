"""A tap sees what one MoE layer is given and gives, without changing it.

It sits on the experts module as a forward hook, or as an experts implementation registered with transformers that
delegates to the one chosen before. Outputs of single experts are asked for only where a statistic reads them, and only
for the tokens routed to them. Hooks leave the layer's output untouched and so compute the routed experts twice; an
implementation adds the single outputs up itself, and the layer's output equals the stock one up to rounding.

Legend: T positions of a forward pass, N of them no padding, K choices a token, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.anatomy.probe import MoELayer
from moekit.errors import UnsupportedModel
from moekit.trace.meta import index_dtype
from moekit.trace.observation import Observation
from moekit.trace.rows import Rows
from moekit.trace.seam import (
    Experts,
    norms_before,
    read_arguments,
    residual_scale,
    single_outputs,
    uses_sigmoid,
)
from moekit.trace.statistics import LayerStatistics
from moekit.trace.tokens import TokenLabels
from moekit.trace.vocabulary import Source, Statistic, sources_of

# Elements of single experts' outputs held at a time (in fp32 64 MiB).
CHUNK_ELEMENTS = 1 << 24


class Pass:
    """The forward pass under way.

    Attributes:
        positions: T.
        tokens: N.
        labels: of the N tokens, on the CPU.
        domains: names of the domains known so far.
    """

    def __init__(self, rows: Rows, domains: Sequence[str]) -> None:
        self.positions = rows.mask_BS.numel()
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


@dataclass
class Staged:
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
    """What the experts were called with in this pass: all positions, then tokens only."""

    hidden_TH: Tensor
    hidden_NH: Tensor
    index_NK: Tensor
    weights_NK: Tensor


class LayerTap:
    """Sees one layer.

    Args:
        model: the model, for what stands around the layer.
        layer: the layer.
        statistics: those to measure while the pass runs, because they read more than choices and weights.
    """

    def __init__(self, model: nn.Module, layer: MoELayer, statistics: Sequence[Statistic]) -> None:
        self.layer = layer
        self.staged: Staged | None = None
        self._statistics = list(statistics)
        self._sources: frozenset[Source] = sources_of(statistics)
        self._norm_modules = norms_before(model, layer) if "residual" in self._sources else []
        self._scale = residual_scale(model, layer) if "residual" in self._sources else 1.0
        self._sigmoid = "logits" in self._sources and uses_sigmoid(layer)
        self._pass: Pass | None = None
        self._call: _Call | None = None
        self._logits: Tensor | None = None
        self._norms: list[tuple[Tensor, Tensor]] = []

    def begin(self, current: Pass | None) -> None:
        """A forward pass begins, or (None) ends; what a failed one left is forgotten."""
        self._pass = current
        self.staged, self._call, self._logits = None, None, None
        self._norms.clear()

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

    def implementation(self, chosen: Experts) -> Experts:
        """The experts' forward that records and delegates to `chosen`."""

        def forward(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
            if self._pass is None:
                return chosen(hidden_TH, index_TK, weights_TK)
            self._see(hidden_TH.detach(), index_TK, weights_TK.detach())
            if "outputs" not in self._sources:
                if "residual" not in self._sources:
                    self._measure(None, None)
                return chosen(hidden_TH, index_TK, weights_TK)
            outputs_TKH = single_outputs(chosen, hidden_TH, index_TK, self.layer.geometry.experts)
            output_TH = (outputs_TKH * weights_TK.unsqueeze(-1)).sum(dim=1).to(hidden_TH.dtype)
            outputs_NKH = self._pass.keep(outputs_TKH.detach())
            self._measure(lambda rows: outputs_NKH[rows], output_TH.detach())
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
        self._see(hidden_TH.detach(), index_TK, weights_TK.detach())
        if "residual" not in self._sources:
            self._measure(self._outputs_again, None)

    def _on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._pass is not None and self._call is not None:
            self._measure(self._outputs_again, output.detach())

    def _see(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        assert self._pass is not None
        if self.staged is not None or index_TK.shape[0] != self._pass.positions:
            what = "twice" if self.staged is not None else f"on {index_TK.shape[0]} positions"
            raise UnsupportedModel(
                f"the experts ran {what} in a forward pass of {self._pass.positions} positions",
                layer=self.layer.index,
                hint="tokens can be told apart only where each MoE layer sees all positions of a pass, once",
            )
        index_NK, weights_NK = self._pass.keep(index_TK), self._pass.keep(weights_TK)
        small_NK = index_NK.to(index_dtype(self.layer.geometry.experts))
        if not self._pass.tokens:
            self.staged = Staged(small_NK, weights_NK, None, [])
            return
        extremes = torch.stack(torch.aminmax(index_NK)).long()
        self.staged = Staged(small_NK, weights_NK, extremes, [weights_NK.sum(dtype=torch.float32)])
        if self._statistics:
            self._call = _Call(hidden_TH, self._pass.keep(hidden_TH), index_NK.long(), weights_NK)

    def _outputs_again(self, rows: slice) -> Tensor:
        assert self._call is not None
        return single_outputs(
            self.layer.experts.forward,  # not the module itself, whose hooks would see this call
            self._call.hidden_NH[rows],
            self._call.index_NK[rows],
            self.layer.geometry.experts,
        )

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
    def _measure(self, outputs: Callable[[slice], Tensor] | None, routed_TH: Tensor | None) -> None:
        call, self._call = self._call, None
        if call is None or self._pass is None or self.staged is None:
            return
        self._call = call  # `outputs` reads it
        parts: dict[str, Tensor] = {"hidden": call.hidden_NH, "weights": call.weights_NK}
        if "logits" in self._sources:
            assert self._logits is not None  # the router ran before its experts
            parts["logits"] = self._pass.keep(self._logits.reshape(-1, self._logits.shape[-1]))
            # -inf is legal: a router may forbid experts so. NaN and +inf are not.
            self.staged.checks.append(parts["logits"].clamp_min(-1.0).sum(dtype=torch.float32))
        if "residual" in self._sources:
            assert routed_TH is not None
            parts["residual"] = self._pass.keep(self._residual_TH(call.hidden_TH))
            parts["routed"] = self._pass.keep(routed_TH) * self._scale
        tokens, top_k = call.index_NK.shape
        wide = "outputs" in self._sources
        step = max(1, CHUNK_ELEMENTS // (top_k * call.hidden_NH.shape[1])) if wide else tokens
        stats = LayerStatistics(self.layer.geometry.experts, self.layer.geometry.hidden, self._pass.domains)
        for start in range(0, tokens, step):
            rows = slice(start, min(start + step, tokens))
            seen = Observation(
                self.layer.geometry.experts,
                call.index_NK[rows],
                domains=len(self._pass.domains),
                domain=self._pass.labels.domain_N[rows],
                position=self._pass.labels.position_N[rows],
                sigmoid=self._sigmoid,
                outputs=outputs(rows) if wide and outputs is not None else None,
                **{name: part[rows] for name, part in parts.items()},
            )
            self.staged.measured.append(stats.measure(seen, self._statistics))
        self._call = None
