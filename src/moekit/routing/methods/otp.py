"""OTP: a small network for each layer learns how many of its experts a token needs (MC#, arXiv:2510.10962).

Legend: T tokens, H hidden, E experts, K choices a token, P width of the mask network, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from moekit.anatomy.gate import GateSpec
from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.runtime.context import ForwardContext
from moekit.runtime.inputs import PartInputs
from moekit.runtime.part import LayerInit
from moekit.runtime.router import LimitPart, Routed, RouteInputs

# Share of the probability that "keep all" begins with, by the bias of the last layer alone.
_KEEP_ALL = 0.95
_SMALL = torch.finfo(torch.float32).tiny


def prefix_mask(prefix_TK: Tensor) -> Tensor:
    """Which of a token's experts stay, the strongest first, from how many do: [T, K].

    Args:
        prefix_TK: probability, or one-hot choice, of "keep the best j" for j = 1 to K.
    """
    return prefix_TK.flip(1).cumsum(1).flip(1)


def gumbel_softmax(logits_TK: Tensor, uniform_TK: Tensor, tau: float) -> Tensor:
    """softmax((log pi + g) / tau), g = -log(-log u): a relaxed draw from softmax(logits), [T, K].

    Args:
        logits_TK: log pi, up to a number that all of a token's share.
        uniform_TK: u, in [0, 1).
        tau: temperature: the smaller, the nearer to one choice.
    """
    uniform_TK = uniform_TK.clamp(_SMALL, 1 - torch.finfo(uniform_TK.dtype).eps)
    return ((logits_TK - (-uniform_TK.log()).log()) / tau).softmax(dim=1)


def hard(soft_TK: Tensor) -> Tensor:
    """The likeliest as one-hot, with the gradient of what it was taken from (straight-through)."""
    taken_TK = torch.zeros_like(soft_TK).scatter(1, soft_TK.argmax(dim=1, keepdim=True), 1.0)
    return taken_TK + (soft_TK - soft_TK.detach())


def masked_weights(weights_TK: Tensor, mask_TK: Tensor, spec: GateSpec) -> Tensor:
    """Weights of the experts that stay, fp32: with the sum of all, where the family makes weights add up.

    Args:
        weights_TK: of all choices.
        mask_TK: 1 for those that stay, 0 for the others.
        spec: the family's gate.
    """
    whole_TK = weights_TK.float()
    kept_TK = whole_TK * mask_TK
    if not spec.normalise and not spec.scoring.startswith("selected_softmax"):
        return kept_TK
    ratio_T1 = whole_TK.sum(dim=1, keepdim=True) / kept_TK.sum(dim=1, keepdim=True).clamp_min(_SMALL)
    # Exactly 1 where all stay, so that such a token is computed as before, bit for bit.
    return kept_TK * ratio_T1


class Pressure(nn.Module):
    """The factor on the kept experts, moved by a proportional-integral controller; one for all layers.

    Args:
        layers: decoder layers whose masks it moves, in order.

    Attributes:
        factor: lambda, nats a kept expert.
        integral: of how far more experts were kept than wanted, times `rate`.
    """

    factor: Tensor
    integral: Tensor

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.register_buffer("factor", torch.zeros(()))
        self.register_buffer("integral", torch.zeros(()))

    @torch.no_grad()
    def steer(self, kept: Tensor, wanted: float, *, rate: float, gain: float) -> None:
        """Raise the factor while more is kept than wanted, and let it fall, to 0 at the least, while less is.

        Args:
            kept: mean experts a token that were kept, over all layers.
            wanted: what that should be.
            rate: answer to what has gathered.
            gain: answer to the present excess.
        """
        excess = kept.to(self.integral) - wanted
        self.integral.copy_((self.integral + rate * excess).clamp_min(0))
        self.factor.copy_((self.integral + gain * excess).clamp_min(0))


@register(
    name="otp",
    kind="routing",
    paper="arXiv:2510.10962",
    changes="routing",
    stock=False,
    traits=("variable_k", "stateful"),
    limits=(
        "Untrained it keeps every expert: train what was attached (`moekit train --parts attached`) against the model "
        "itself as the teacher.",
        "Shape of the network, temperatures and the rule that moves the factor are ours: the paper's were not found.",
        "All experts are computed while it trains; afterwards time is saved only where the experts' kernels skip "
        "choices of no expert.",
    ),
)
class OTP(LimitPart):
    """A learned mask keeps the best j of a token's K experts, j from 1 to K as the token needs.

    In each layer logits over j come from a network W2 silu(W1 [x / rms(x), w]), w the token's K gate weights in falling
    order. Routed they keep the likeliest j. In training j is drawn by Gumbel-softmax, with the hard choice forwards and
    the soft one's gradient backwards, at a temperature that falls from `tau` to `tau_end` over the run; the mean number
    of experts kept enters the loss with a factor that a controller moves until that mean is `keep` of K, over all
    layers together. Where a family makes weights add up, those of the experts that stay do so again. It starts by
    keeping all. Choose it to spend less time a token where there is text to train on; `odp` and `naee-skip` need none.
    """

    axes: ClassVar[Mapping[str, str]] = {"input": "PH", "gates": "PK", "start": "P", "output": "KP", "bias": "K"}

    keep: float = Field(
        default=0.8, gt=0, le=1, description="share of a token's experts that should stay, on average over layers"
    )
    width: int = Field(default=32, ge=1, description="hidden width of the mask networks")
    tau: float = Field(default=2.0, gt=0, description="temperature at the beginning of training")
    tau_end: float = Field(default=0.5, gt=0, description="temperature at its end")
    rate: float = Field(default=0.01, ge=0, description="answer of the controller to what has gathered, nats a pass")
    gain: float = Field(default=0.05, ge=0, description="answer of the controller to the present excess, nats")
    seed: int = Field(default=0, ge=0, description="of the draws in training")

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse models of one expert a token, and means below one expert."""
        if geometry.top_k < 2:
            raise BadConfig(f"a token chooses {geometry.top_k} expert(s) here; one must stay", layer=layer)
        if self.keep * geometry.top_k < 1:
            raise BadConfig(
                f"{self.keep:g} of {geometry.top_k} experts is less than one",
                layer=layer,
                hint=f"keep at least {1 / geometry.top_k:g}",
            )

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[OTP]:
        """The defaults on a narrow network."""
        return [cls(width=4)]

    def parameters(self, init: LayerInit) -> nn.Module:
        """A random first layer, and a second one that says "keep all"."""
        hidden, top_k = init.geometry.hidden, init.geometry.top_k
        into_PN = torch.randn(self.width, hidden + top_k, generator=init.generator) / math.sqrt(hidden + top_k)
        bias_K = torch.zeros(top_k)
        bias_K[-1] = math.log(_KEEP_ALL * (top_k - 1) / (1 - _KEEP_ALL))
        made = {
            "input": into_PN[:, :hidden].clone(),
            "gates": into_PN[:, hidden:].clone(),
            "start": torch.zeros(self.width),
            "output": torch.zeros(top_k, self.width),
            "bias": bias_K,
        }
        return nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in made.items()})

    def shared(self, layers: Sequence[LayerInit]) -> nn.Module:
        """The factor and what moves it."""
        return Pressure(sorted(init.layer for init in layers))

    def limit(self, inputs: RouteInputs, routed: Routed) -> Routed:
        """Keep the strongest choices of each token, as many as the mask says."""
        order_TK = routed.weights.argsort(dim=1, descending=True, stable=True)
        logits_TK = self._logits(inputs, routed.weights.gather(1, order_TK))
        if self._trains(inputs):
            context = inputs.context
            uniform_TK = torch.rand(logits_TK.shape, generator=context.generator(inputs.layer, self.seed))
            tau = self.tau + (self.tau_end - self.tau) * context.progress
            prefix_TK = hard(gumbel_softmax(logits_TK, uniform_TK.to(logits_TK.device), tau))
        else:
            prefix_TK = hard(logits_TK.softmax(dim=1))
        sorted_TK = prefix_mask(prefix_TK)
        mask_TK = torch.zeros_like(sorted_TK).scatter(1, order_TK, sorted_TK)
        weights_TK = masked_weights(routed.weights, mask_TK, inputs.gate.spec).to(routed.weights.dtype)
        if self._trains(inputs):
            # All choices run, those that are masked with weight 0: their gradient says whether they were needed.
            return Routed(weights_TK, routed.indices, losses={"kept": self._loss(inputs, mask_TK, logits_TK)})
        gone_TK = mask_TK == 0
        return Routed(weights_TK.masked_fill(gone_TK, 0), routed.indices.masked_fill(gone_TK, inputs.geometry.experts))

    def _logits(self, inputs: RouteInputs, weights_TK: Tensor) -> Tensor:
        """Logits over how many stay, fp32; `weights_TK` in falling order."""
        own = {name: tensor.float() for name, tensor in inputs.learned.items()}
        hidden_TH = inputs.hidden_TH.float()
        scaled_TH = hidden_TH * torch.rsqrt(hidden_TH.square().mean(dim=1, keepdim=True) + 1e-6)
        inner_TP = scaled_TH @ own["input"].T + weights_TK.float() @ own["gates"].T + own["start"]
        logits_TK: Tensor = nn.functional.silu(inner_TP) @ own["output"].T + own["bias"]
        return logits_TK

    def _trains(self, inputs: PartInputs) -> bool:
        """Whether masks are drawn, to be learned from."""
        learns = inputs.learned.training and any(p.requires_grad for p in inputs.learned.values())
        # Asked for first: a pass that is taken apart (reentrant checkpointing) is refused where it begins.
        return learns and inputs.tracker is not None and inputs.context.armed and torch.is_grad_enabled()

    def _loss(self, inputs: RouteInputs, mask_TK: Tensor, logits_TK: Tensor) -> Tensor:
        """The factor times the mean number of experts that the drawn masks keep, by layer.

        The factor is moved by the number that routing would keep, without a draw: that is what is asked for.
        """
        context = inputs.context
        layers = inputs.shared.layers
        if inputs.layer == layers[0]:
            # What a pass is computed with: the factor has moved when a layer is repeated for the backward pass.
            context.put(inputs.layer, "otp.factor", inputs.shared.factor.clone())
        real_T1 = context.token_mask(mask_TK.device).reshape(-1, 1).to(mask_TK)
        tokens = real_T1.sum().clamp_min(1)
        kept = (mask_TK * real_T1).sum() / tokens
        routed = ((logits_TK.detach().argmax(dim=1, keepdim=True) + 1) * real_T1).sum() / tokens
        context.put(inputs.layer, "otp.kept", routed / mask_TK.shape[1])
        if inputs.layer == layers[-1] and not context.tracker.repeating:
            self._steer(inputs, context, mask_TK.shape[1])
        return context.get(layers[0], "otp.factor").to(kept) * kept / len(layers)

    def _steer(self, inputs: RouteInputs, context: ForwardContext, top_k: int) -> None:
        share = torch.stack([context.get(n, "otp.kept").to(inputs.shared.factor) for n in inputs.shared.layers])
        inputs.shared.steer(share.mean() * top_k, self.keep * top_k, rate=self.rate, gain=self.gain)
