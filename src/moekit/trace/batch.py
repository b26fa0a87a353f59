"""What is known about some tokens at one MoE layer; statistics are measured on it.

Legend: N tokens, n tokens of one expert, K choices a token, E experts, H hidden, I expert width, D domains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
        hidden: what the experts saw, [N, H].
        inner: input of the down projection of each chosen expert, [N, K, I]; zero where the choice is none.
        outputs: output of each chosen expert before gating, [N, K, H]; zero where the choice is none.
        norms: norms of these outputs, [N, K], where the outputs themselves were not kept.
        peaks: their largest absolute values and the channels of these, [N, K] each.
        residual: residual stream before the block, not normalised, [N, H].
        routed: what the routed experts add to it, gated and summed, [N, H].
        shared: output of the shared experts, [N, H].
        stream: residual stream after the decoder layer, [N, H].
    """

    experts: int
    indices_NK: Tensor
    domains: int = 1
    domain: Tensor | None = None
    position: Tensor | None = None
    weights: Tensor | None = None
    logits: Tensor | None = None
    sigmoid: bool = False
    hidden: Tensor | None = None
    inner: Tensor | None = None
    outputs: Tensor | None = None
    norms: Tensor | None = None
    peaks: tuple[Tensor, Tensor] | None = None
    residual: Tensor | None = None
    routed: Tensor | None = None
    shared: Tensor | None = None
    stream: Tensor | None = None

    @property
    def tokens(self) -> int:
        """N."""
        return self.indices_NK.shape[0]

    @staticmethod
    def _have(value: Tensor | None, name: str) -> Tensor:
        if value is None:
            raise LookupError(f"{name} were not recorded: name them in the statistic's `sources`")
        return value

    @property
    def domain_N(self) -> Tensor:
        """Number of each token's domain, [N] int64."""
        return self._have(self.domain, "domains").to(device=self.indices_NK.device, dtype=torch.int64)

    @property
    def position_N(self) -> Tensor:
        """Each token's position in its sequence, [N] int64."""
        return self._have(self.position, "positions").to(device=self.indices_NK.device, dtype=torch.int64)

    @cached_property
    def weights_NK(self) -> Tensor:
        """Gate weights, fp32; zero where the choice is none."""
        weights_NK = self._have(self.weights, "weights").float()
        return weights_NK.masked_fill(self.indices_NK >= self.experts, 0.0)

    @cached_property
    def logits_NE(self) -> Tensor:
        """Router logits, fp32."""
        return self._have(self.logits, "logits").float()

    @cached_property
    def scores_NE(self) -> Tensor:
        """Scores of all experts, fp32: softmax or sigmoid of the logits, before bias, groups and top-k."""
        return self.logits_NE.sigmoid() if self.sigmoid else self.logits_NE.softmax(dim=-1)

    @cached_property
    def hidden_NH(self) -> Tensor:
        """What the experts saw, fp32."""
        return self._have(self.hidden, "inputs").float()

    @cached_property
    def outputs_NKH(self) -> Tensor:
        """Output of each chosen expert before gating, fp32."""
        return self._have(self.outputs, "outputs").float()

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
        return self._have(self.shared, "outputs of shared experts").float()

    @cached_property
    def stream_NH(self) -> Tensor:
        """Residual stream after the decoder layer, fp32."""
        return self._have(self.stream, "the residual stream after the layer").float()

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
    def change_N(self) -> Tensor:
        """How much the routed experts turn the residual stream: max(1 - cos(h, h + routed), 0), arXiv:2504.06792."""
        residual_NH = self._have(self.residual, "the residual stream").float()
        routed_NH = self._have(self.routed, "routed outputs").float()
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
    def gates_NE(self) -> Tensor:
        """Gate weight of each expert, 0 where not chosen."""
        return self.spread(self.weights_NK)

    def per_expert(self, values_NK: Tensor) -> Tensor:
        """Sum over tokens of a value of each choice, by expert: [E] fp64."""
        return accumulate(self.spread(values_NK), 0)


@dataclass(frozen=True, eq=False)
class ExpertBatch:
    """What one expert saw and gave.

    Attributes:
        expert: which one.
        weights: gate weights of its n tokens, [n].
        hidden: its inputs, [n, H].
        inner: inputs of its down projection, [n, I].
        outputs: its outputs before gating, [n, H].
    """

    expert: int
    weights: Tensor | None = None
    hidden: Tensor | None = None
    inner: Tensor | None = None
    outputs: Tensor | None = None

    @staticmethod
    def _have(value: Tensor | None, name: str) -> Tensor:
        if value is None:
            raise LookupError(f"{name} were not recorded: name them in the statistic's `sources`")
        return value.float()

    @property
    def weights_n(self) -> Tensor:
        """Gate weights, fp32."""
        return self._have(self.weights, "weights")

    @property
    def hidden_nH(self) -> Tensor:
        """Inputs, fp32."""
        return self._have(self.hidden, "inputs")

    @property
    def inner_nI(self) -> Tensor:
        """Inputs of the down projection, fp32."""
        return self._have(self.inner, "inputs of the down projection")

    @property
    def outputs_nH(self) -> Tensor:
        """Outputs before gating, fp32."""
        return self._have(self.outputs, "outputs")


def widest(device: torch.device) -> torch.dtype:
    """The widest float of a device: fp64, but on Apple's GPUs fp32."""
    return torch.float32 if device.type == "mps" else torch.float64


def accumulate(values: Tensor, dim: int | None = None) -> Tensor:
    """Sum in the device's widest float."""
    wide = widest(values.device)
    return values.sum(dim=dim, dtype=wide) if dim is not None else values.sum(dtype=wide)
