"""Weight maps between a dense feed-forward network and experts, as pure functions.

Shapes: T tokens, H hidden, F width of the dense network (its neurons), E experts, I expert width, J = 2I (gate rows,
then up rows), S width of the shared expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

# The shared expert of Qwen2-MoE is multiplied by sigmoid(gate row . x); a zero row makes that one half.
SHARED_FACTOR = 2.0


class DenseFFN(NamedTuple):
    """A gated feed-forward network y = down (silu(gate x) * up x)."""

    gate_FH: torch.Tensor
    up_FH: torch.Tensor
    down_HF: torch.Tensor

    def take(self, neurons: torch.Tensor, scale: float = 1.0) -> DenseFFN:
        """The network of some of the neurons, its output scaled."""
        return DenseFFN(self.gate_FH[neurons], self.up_FH[neurons], self.down_HF[:, neurons] * scale)


class MoEWeights(NamedTuple):
    """Weights of one MoE block; `shared` is None where there is no shared expert."""

    router_EH: torch.Tensor
    gate_up_EJH: torch.Tensor
    down_EHI: torch.Tensor
    shared: DenseFFN | None


def neuron_outputs(ffn: DenseFFN, x_TH: torch.Tensor) -> torch.Tensor:
    """Inner activations h = silu(gate x) * up x, [T, F]."""
    return F.silu(x_TH @ ffn.gate_FH.T) * (x_TH @ ffn.up_FH.T)


def ffn_forward(ffn: DenseFFN, x_TH: torch.Tensor) -> torch.Tensor:
    """Output of the dense network, [T, H]."""
    return neuron_outputs(ffn, x_TH) @ ffn.down_HF.T


def gather_experts(ffn: DenseFFN, neurons_EI: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Build fused expert weights from neurons of a dense network.

    Args:
        ffn: the dense network.
        neurons_EI: which neurons each expert takes.
        scale: factor on every expert's output.

    Returns:
        `gate_up_EJH`, gate rows before up rows, and `down_EHI`.
    """
    gate_EIH, up_EIH = ffn.gate_FH[neurons_EI], ffn.up_FH[neurons_EI]
    down_EHI = ffn.down_HF[:, neurons_EI].permute(1, 0, 2) * scale
    return torch.cat([gate_EIH, up_EIH], dim=1), down_EHI.contiguous()


def expert_energies(ffn: DenseFFN, x_TH: torch.Tensor, neurons_EI: torch.Tensor) -> torch.Tensor:
    """Squared length of each expert's unscaled output ||E_e(x)||^2, [T, E]."""
    h_TF = neuron_outputs(ffn, x_TH)
    energies = [(h_TF[:, n_I] @ ffn.down_HF[:, n_I].T).square().sum(-1) for n_I in neurons_EI]
    return torch.stack(energies, dim=-1)


def neuron_strengths(ffn: DenseFFN, x_TH: torch.Tensor) -> torch.Tensor:
    """How much each neuron adds to the output of each token: |h_j| ||down_j||, [T, F]."""
    lengths_F: torch.Tensor = torch.linalg.vector_norm(ffn.down_HF, dim=0)
    return neuron_outputs(ffn, x_TH).abs() * lengths_F
