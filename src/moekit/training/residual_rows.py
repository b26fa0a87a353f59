"""Rows of factored experts' residuals compete for a share that shrinks while they train (MC-SMoE, arXiv:2310.01334).

Legend: E experts, O outputs of a matrix, N rows of all residuals of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moekit.experts.factored_expert import Factors
from moekit.experts.factored_model import factored, factors_on
from moekit.experts.methods.factored import Factored
from moekit.training.schedules.cubic import Cubic


def kept_share(part: Factored, progress: float) -> float:
    """Share of the rows that stay when a share of the run is done: 1, then along a cubic, then `keep`."""
    return Cubic(start=1.0, end=part.keep, after=part.after, until=part.until).value(progress)


@torch.no_grad()
def score_rows(learned: Sequence[Factors], memory: float) -> None:
    """Move each row's score: memory * score + (1 - memory) * mean over the row of |z dLoss/dz|.

    The paper smooths entries and takes the mean of a row then; as both are linear, the mean may come first. Residuals
    without a gradient, which no token reached, count as 0.
    """
    for factors in learned:
        for part, rest_EOJ in factors.residuals.items():
            score_EO = factors[f"{part}_score"]
            gradient = rest_EOJ.grad
            new_EO = torch.zeros_like(score_EO) if gradient is None else (rest_EOJ * gradient).abs().float().mean(-1)
            score_EO.mul_(memory).add_(new_EO, alpha=1 - memory)


@torch.no_grad()
def drop_rows(learned: Sequence[Factors], share: float) -> int:
    """Zero all rows but the best of all residuals together; of equal ones the first stay.

    Args:
        learned: of all layers.
        share: of the rows that stay.

    Returns:
        How many stay.
    """
    residuals = [(factors, part, rest) for factors in learned for part, rest in factors.residuals.items()]
    scores_N = torch.cat([factors[f"{part}_score"].flatten() for factors, part, _ in residuals])
    count = round(share * len(scores_N))
    if count == len(scores_N):
        return count
    kept_N = torch.zeros_like(scores_N, dtype=torch.bool)
    kept_N[scores_N.argsort(descending=True, stable=True)[:count]] = True
    sizes = [rest.shape[0] * rest.shape[1] for _, _, rest in residuals]
    for (_, _, rest_EOJ), own_N in zip(residuals, torch.split(kept_N, sizes), strict=True):
        rest_EOJ.masked_fill_(~own_N.view(rest_EOJ.shape[:2])[..., None], 0)
    return count


class ResidualRows(TrainerCallback):  # type: ignore[misc]
    """After each optimizer step scores all rows by that step's gradient, and zeroes those that are beyond the share.

    Zeroed rows go on training and may come back, until the share stands still and the run is over.

    Args:
        part: the part.
        learned: of all its layers, residuals whole.
    """

    def __init__(self, part: Factored, learned: Sequence[Factors]) -> None:
        self._part = part
        self._learned = learned

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are still there."""
        done = (state.global_step + 1) / state.max_steps
        score_rows(self._learned, self._part.memory)
        drop_rows(self._learned, kept_share(self._part, done))


def residual_rows(model: nn.Module) -> ResidualRows | None:
    """What prunes residuals while a model trains; None where there are none that are whole, or none trains."""
    for attachment in factored(model):
        learned = [factors_on(on) for on in attachment.layers.values()]
        training = [f for f in learned if any(rest.requires_grad for rest in f.residuals.values())]
        if training:
            assert isinstance(attachment.part, Factored)
            return ResidualRows(attachment.part, training)
    return None
