"""What all splits share: one dense network is cut into experts of equal size, each neuron in exactly one place.

Shapes: N tokens, H hidden, F dense width, E experts, I expert width, S neurons of the shared expert.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field

from moekit.conversion.base import WIDTH_STEP, Conversion, random_router
from moekit.conversion.maths import SHARED_FACTOR, DenseFFN, MoEWeights, expert_energies, gather_experts
from moekit.conversion.router_fit import energy_shares, fit_router
from moekit.conversion.targets import MoEGeometry, Target
from moekit.errors import BadConfig

# Rows this small keep the order of experts and make their weights equal to about one part in ten thousand.
COLD = 1e-4

SPLIT_LIMITS = (
    "a model of 135 M parameters is unusable at half its neurons without training; choose k near E, or train",
    "the router is stored cold (rows times 1e-4): freeze it while training, a usual step exceeds its weights",
)


class SplitConversion(Conversion):
    """Cut the dense network into E experts, the chosen of which count fully.

    The dense output is the sum over all experts, so each chosen expert must enter with weight 1, where softmax gives
    about 1/E (or 1/k after renormalisation): down_proj is multiplied by E (or k). With k = E the logits equal the dense
    model's. Unnormalised, k can be changed later.

    Attributes:
        shared: neurons that always count, as a shared expert.
        target: stock layout of the result.
        router: "fitted" to each expert's output on calibration text, "random", or "zero".
        router_scale: factor on the router's rows.
        normalised: whether the chosen weights are divided by their sum; Mixtral always does.
    """

    top_k: int = Field(default=6, ge=1, description="experts that each token chooses")
    shared: int = Field(default=0, ge=0, description="neurons of the shared expert, which always count")
    target: Target = Field(default="qwen2_moe", description="stock layout of the result")
    router: Literal["fitted", "random", "zero"] = Field(default="fitted", description="how the router is made")
    router_scale: float = Field(default=COLD, gt=0, description="factor on the router rows; small keeps weights equal")
    normalised: bool | None = Field(default=None, description="norm_topk_prob; left out: only where the layout must")

    @property
    def needs_calibration(self) -> bool:
        """For a fitted router."""
        return self.router == "fitted"

    @property
    def layout(self) -> str:
        """Qwen2-MoE or Mixtral."""
        return self.target

    @property
    def _normalised(self) -> bool:
        return self.target == "mixtral" if self.normalised is None else self.normalised

    def geometry(self, dense_width: int, dense_layers: tuple[int, ...]) -> MoEGeometry:
        """Experts share the neurons that the shared expert leaves, equally."""
        left = dense_width - self.shared
        if left < self.experts or left % self.experts:
            legal = [e for e in range(2, left + 1) if left % (e * WIDTH_STEP) == 0]
            near = sorted(sorted(legal, key=lambda e: (abs(e - self.experts), e))[:3])
            raise BadConfig(
                f"{left} neurons ({dense_width} less {self.shared} shared) do not divide among {self.experts} experts",
                hint=f"nearest numbers of experts: {', '.join(map(str, near))}"
                if near
                else f"let the shared expert leave a multiple of 16 of the {dense_width} neurons",
            )
        width = left // self.experts
        return MoEGeometry(self.experts, self.top_k, width, self.shared, self._normalised, dense_layers)

    @abstractmethod
    def choose_neurons(
        self, ffn: DenseFFN, inputs_NH: torch.Tensor | None, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide where each neuron goes.

        Returns:
            Neurons of the shared expert [S] and of the routed experts [E, I]; together each neuron once.
        """

    def convert_layer(self, ffn: DenseFFN, inputs_NH: torch.Tensor | None, generator: torch.Generator) -> MoEWeights:
        """Gather the experts, scale them so that chosen ones count fully, and make the router."""
        shared_S, neurons_EI = self.choose_neurons(ffn, inputs_NH, generator)
        scale = float(self.top_k if self._normalised else self.experts)
        gate_up_EJH, down_EHI = gather_experts(ffn, neurons_EI, scale)
        hidden = ffn.gate_FH.shape[1]
        if self.router == "fitted":
            assert inputs_NH is not None  # `check` has made sure
            shares_NE = energy_shares(expert_energies(ffn, inputs_NH, neurons_EI))
            router_EH = fit_router(inputs_NH, shares_NE, generator)
        elif self.router == "random":
            router_EH = random_router(self.experts, hidden, generator)
        else:
            router_EH = torch.zeros(self.experts, hidden)
        shared = ffn.take(shared_S, SHARED_FACTOR) if self.shared else None
        return MoEWeights(router_EH * self.router_scale, gate_up_EJH, down_EHI, shared)


def groups_of(owner_F: torch.Tensor, experts: int) -> torch.Tensor:
    """Neurons of each expert [E, I] from the expert of each neuron [F], sizes being equal."""
    return owner_F.argsort(stable=True).view(experts, -1)


def set_apart(score_F: torch.Tensor, shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the `shared` highest scores, and of the rest, each ascending."""
    order_F = score_F.argsort(descending=True, stable=True)
    return order_F[:shared].sort().values, order_F[shared:].sort().values
