"""What one expert saw and gave; statistics that are too large for all choices at once are measured on it.

Legend: n tokens of one expert, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """At least fp32: halves are widened, doubles stay as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def have(value: Tensor | None, name: str) -> Tensor:
    """What was recorded.

    Raises:
        LookupError: it was not.
    """
    if value is None:
        raise LookupError(f"{name} were not recorded: name them in the statistic's `sources`")
    return value


@dataclass(frozen=True, eq=False)
class ExpertGradients:
    """Gradients of the loss, summed over predicted tokens, at one expert.

    Attributes:
        outputs: with respect to its outputs before gating, [n, H].
        inner: with respect to the inputs of its down projection, [n, I].
        weights: with respect to its weights by parameter name ("gate_up_proj", "down_proj", biases), each in the layout
            in which the family stores one expert; empty unless asked for ("weight_gradients").
    """

    outputs: Tensor
    inner: Tensor
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class ExpertBatch:
    """What one expert saw and gave.

    Attributes:
        expert: which one.
        weights: gate weights of its n tokens, [n].
        hidden: its inputs, [n, H].
        inner: inputs of its down projection, [n, I].
        outputs: its outputs before gating, [n, H].
        gradients: of the loss.
    """

    expert: int
    weights: Tensor | None = None
    hidden: Tensor | None = None
    inner: Tensor | None = None
    outputs: Tensor | None = None
    gradients: ExpertGradients | None = None

    @property
    def weights_n(self) -> Tensor:
        """Gate weights, fp32 or as wide as the inputs."""
        weights_n = wide(have(self.weights, "weights"))
        return (
            weights_n if self.hidden is None else weights_n.to(torch.promote_types(weights_n.dtype, self.hidden.dtype))
        )

    @property
    def hidden_nH(self) -> Tensor:
        """Inputs, fp32 or wider."""
        return wide(have(self.hidden, "inputs"))

    @property
    def inner_nI(self) -> Tensor:
        """Inputs of the down projection, fp32 or wider."""
        return wide(have(self.inner, "inputs of the down projection"))

    @property
    def outputs_nH(self) -> Tensor:
        """Outputs before gating, fp32 or wider."""
        return wide(have(self.outputs, "outputs"))

    @property
    def output_gradient_nH(self) -> Tensor:
        """Gradient of the loss with respect to the outputs before gating, fp32 or wider."""
        return wide(have(self.gradients.outputs if self.gradients else None, "gradients"))

    @property
    def inner_gradient_nI(self) -> Tensor:
        """Gradient of the loss with respect to the inputs of the down projection, fp32 or wider."""
        return wide(have(self.gradients.inner if self.gradients else None, "gradients"))

    @property
    def weight_gradients(self) -> Mapping[str, Tensor]:
        """Gradients of the loss with respect to the expert's weights, by parameter name."""
        if self.gradients is None or not self.gradients.weights:
            raise LookupError("weight_gradients were not recorded: name them in the statistic's `sources`")
        return self.gradients.weights
