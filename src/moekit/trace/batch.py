"""What is known about some tokens at one MoE layer; statistics are measured on it.

Legend: N tokens, n tokens of one expert, K choices a token, E experts, H hidden, I expert width, D domains, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moekit.trace.attention_batch import AttentionBatch
from moekit.trace.expert_batch import ExpertBatch, have, wide

__all__ = ["ExpertBatch", "TokenBatch", "accumulate", "wide", "widest"]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Some tokens at one MoE layer; padding is left out already.

    Only what was recorded is there: a statistic names in `sources` what it reads, and the recorder sees to it. Reading
    anything else raises `LookupError`.

    Attributes:
        experts: E.
        indices_NK: chosen experts, int64; E means none.
        domains: D, number of domains known so far.
        domain: number of each token's domain, [N].
        position: each token's position in its sequence, [N].
        weights: gate weights as they multiply the outputs, [N, K].
        logits: router logits, [N, E].
        sigmoid: whether scores are sigmoids of the logits; else their softmax.
        weighs_inputs: weights multiply what experts are given.
        hidden: what the experts saw, [N, H].
        inner: input of the down projection of each chosen expert, [N, K, I]; zero where the choice is none.
        outputs: output of each chosen expert before gating, [N, K, H]; zero where the choice is none.
        norms: norms of these outputs, [N, K], where the outputs themselves were not kept.
        peaks: their largest absolute values and the channels of these, [N, K] each.
        residual: residual stream before the block, not normalised, [N, H].
        routed: what the routed experts add to it, gated and summed, [N, H].
        shared: output of the shared experts, [N, H].
        stream: residual stream after the decoder layer, [N, H].
        layer_input: residual stream before the decoder layer, [N, H].
        block_input: what the feed-forward block is given, [N, H].
        block_output: what it gives, [N, H].
        modules: input and output, [N, C] each, of modules by their paths below the decoder layer.
        attention: queries and keys of the layer, of the whole pass.
        received: attention paid to each token, [N], where taken out of `attention` already.
        all_outputs: outputs of all experts, [N, E, H].
        stream_gradient: of the loss, with respect to `stream`, [N, H].
        block_gradient: of the loss, with respect to `block_output`, [N, H].
    """

    experts: int
    indices_NK: Tensor
    domains: int = 1
    domain: Tensor | None = None
    position: Tensor | None = None
    weights: Tensor | None = None
    logits: Tensor | None = None
    sigmoid: bool = False
    weighs_inputs: bool = False
    hidden: Tensor | None = None
    inner: Tensor | None = None
    outputs: Tensor | None = None
    norms: Tensor | None = None
    peaks: tuple[Tensor, Tensor] | None = None
    residual: Tensor | None = None
    routed: Tensor | None = None
    shared: Tensor | None = None
    stream: Tensor | None = None
    layer_input: Tensor | None = None
    block_input: Tensor | None = None
    block_output: Tensor | None = None
    modules: Mapping[str, tuple[Tensor, Tensor]] | None = None
    attention: AttentionBatch | None = None
    received: Tensor | None = None
    all_outputs: Tensor | None = None
    stream_gradient: Tensor | None = None
    block_gradient: Tensor | None = None

    @property
    def tokens(self) -> int:
        """N."""
        return self.indices_NK.shape[0]

    def given(self, name: str) -> Tensor:
        """A recorded tensor by its field's name, in the model's own type.

        Raises:
            LookupError: it was not recorded.
        """
        value: Tensor = have(getattr(self, name), name)
        return value

    def rows(self, which: slice) -> TokenBatch:
        """Some of the tokens."""
        cut: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                cut[entry.name] = value[which]
        if self.peaks is not None:
            cut["peaks"] = (self.peaks[0][which], self.peaks[1][which])
        if self.modules is not None:
            cut["modules"] = {path: (a[which], b[which]) for path, (a, b) in self.modules.items()}
        if self.attention is not None:
            cut |= {"attention": None, "received": self.received_N[which]}
        return replace(self, **cut)

    @property
    def domain_N(self) -> Tensor:
        """Number of each token's domain, [N] int64."""
        return have(self.domain, "domains").to(device=self.indices_NK.device, dtype=torch.int64)

    @property
    def position_N(self) -> Tensor:
        """Each token's position in its sequence, [N] int64."""
        return have(self.position, "positions").to(device=self.indices_NK.device, dtype=torch.int64)

    @cached_property
    def weights_NK(self) -> Tensor:
        """Gate weights, fp32; zero where the choice is none."""
        weights_NK = wide(have(self.weights, "weights"))
        return weights_NK.masked_fill(self.indices_NK >= self.experts, 0.0)

    @cached_property
    def logits_NE(self) -> Tensor:
        """Router logits, fp32."""
        return wide(have(self.logits, "logits"))

    @cached_property
    def scores_NE(self) -> Tensor:
        """Scores of all experts, fp32: softmax or sigmoid of the logits, before bias, groups and top-k."""
        return self.logits_NE.sigmoid() if self.sigmoid else self.logits_NE.softmax(dim=-1)

    @cached_property
    def hidden_NH(self) -> Tensor:
        """What the experts saw, fp32."""
        return wide(have(self.hidden, "inputs"))

    @cached_property
    def outputs_NKH(self) -> Tensor:
        """Output of each chosen expert before gating, fp32."""
        return wide(have(self.outputs, "outputs"))

    @cached_property
    def output_norm_NK(self) -> Tensor:
        """Euclidean norm of each chosen expert's output before gating."""
        if self.norms is not None:
            return self.norms
        norm_NK: Tensor = torch.linalg.vector_norm(self.outputs_NKH, dim=-1)
        return norm_NK

    @cached_property
    def output_peak_NK(self) -> tuple[Tensor, Tensor]:
        """Largest absolute value of each chosen expert's output before gating, and its channel."""
        if self.peaks is not None:
            return self.peaks
        value_NK, channel_NK = self.outputs_NKH.abs().max(dim=-1)
        return value_NK, channel_NK

    @cached_property
    def shared_NH(self) -> Tensor:
        """Output of the shared experts, fp32."""
        return wide(have(self.shared, "outputs of shared experts"))

    @cached_property
    def stream_NH(self) -> Tensor:
        """Residual stream after the decoder layer, fp32."""
        return wide(have(self.stream, "the residual stream after the layer"))

    def expert_batches(self) -> Iterator[ExpertBatch]:
        """What each expert saw and gave, expert by expert; experts that no token chose are left out."""
        for expert in range(self.experts):
            token_n, slot_n = (self.indices_NK == expert).nonzero(as_tuple=True)
            if len(token_n):
                yield ExpertBatch(
                    expert,
                    weights=None if self.weights is None else self.weights_NK[token_n, slot_n],
                    hidden=None if self.hidden is None else self.hidden[token_n],
                    inner=None if self.inner is None else self.inner[token_n, slot_n],
                    outputs=None if self.outputs is None else self.outputs[token_n, slot_n],
                )

    @cached_property
    def layer_input_NH(self) -> Tensor:
        """Residual stream before the decoder layer, fp32 or wider."""
        return wide(have(self.layer_input, "inputs of the decoder layer"))

    @cached_property
    def block_input_NH(self) -> Tensor:
        """What the feed-forward block is given, fp32 or wider."""
        return wide(have(self.block_input, "inputs of the block"))

    @cached_property
    def block_output_NH(self) -> Tensor:
        """What the feed-forward block gives, fp32 or wider."""
        return wide(have(self.block_output, "outputs of the block"))

    def module(self, path: str) -> tuple[Tensor, Tensor]:
        """Input [N, C] and output [N, C'] of a module by its path below the decoder layer, fp32 or wider."""
        if self.modules is None or path not in self.modules:
            raise LookupError(f"{path} was not recorded: name 'module:{path}' in the statistic's `sources`")
        given, made = self.modules[path]
        return wide(given), wide(made)

    @cached_property
    def received_N(self) -> Tensor:
        """Attention paid to each token by all tokens of its row, mean over heads, fp32 or wider."""
        if self.received is not None:
            return self.received
        if self.attention is None:
            raise LookupError("attention was not recorded: name it in the statistic's `sources`")
        return self.attention.received_N

    @cached_property
    def all_outputs_NEH(self) -> Tensor:
        """Outputs of all experts before gating, fp32 or wider; of a few tokens at a time."""
        return wide(have(self.all_outputs, "all_outputs"))

    @cached_property
    def stream_gradient_NH(self) -> Tensor:
        """Gradient of the loss with respect to the stream after the layer, fp32 or wider."""
        return wide(have(self.stream_gradient, "stream_gradients"))

    @cached_property
    def block_gradient_NH(self) -> Tensor:
        """Gradient of the loss with respect to the block's output, fp32 or wider."""
        return wide(have(self.block_gradient, "stream_gradients"))

    @cached_property
    def change_N(self) -> Tensor:
        """How much the routed experts turn the residual stream: max(1 - cos(h, h + routed), 0), arXiv:2504.06792."""
        residual_NH = wide(have(self.residual, "the residual stream"))
        routed_NH = wide(have(self.routed, "routed outputs"))
        cosine_N = torch.nn.functional.cosine_similarity(residual_NH, residual_NH + routed_NH, dim=-1)
        return (1.0 - cosine_N).clamp_min(0.0)

    def spread(self, values_NK: Tensor) -> Tensor:
        """Values of choices, put under the expert chosen: [N, E]; choices of none are dropped."""
        table_NE = values_NK.new_zeros(self.tokens, self.experts + 1)
        return table_NE.scatter_(1, self.indices_NK, values_NK)[:, : self.experts]

    @cached_property
    def chosen_NE(self) -> Tensor:
        """1 where the token chose the expert, else 0; fp32."""
        return self.spread(torch.ones_like(self.indices_NK, dtype=torch.float32))

    @cached_property
    def given_NE(self) -> Tensor:
        """Factor on the hidden state that each expert was given: 1 where it was chosen, or the weight itself."""
        return self.gates_NE.float() if self.weighs_inputs else self.chosen_NE

    @cached_property
    def gates_NE(self) -> Tensor:
        """Gate weight of each expert, 0 where not chosen."""
        return self.spread(self.weights_NK)

    def per_expert(self, values_NK: Tensor) -> Tensor:
        """Sum over tokens of a value of each choice, by expert: [E] fp64."""
        return accumulate(self.spread(values_NK), 0)


def widest(device: torch.device) -> torch.dtype:
    """The widest float of a device: fp64, but on Apple's GPUs fp32."""
    return torch.float32 if device.type == "mps" else torch.float64


def accumulate(values: Tensor, dim: int | None = None) -> Tensor:
    """Sum in the device's widest float."""
    wide = widest(values.device)
    return values.sum(dim=dim, dtype=wide) if dim is not None else values.sum(dtype=wide)
