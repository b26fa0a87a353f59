"""Fit a linear router to what each expert would add, on calibration text.

Shapes: T tokens of a step, N tokens in all, H hidden, E experts.
"""

from __future__ import annotations

import torch

from moekit._progress import Progress, track

STEPS = 200
LEARNING_RATE = 1e-2
TOKENS_PER_STEP = 512


def energy_shares(energy_NE: torch.Tensor) -> torch.Tensor:
    """Share of each expert in the summed energies of a token, p_e = ||E_e(x)||^2 / sum; rows sum to 1."""
    tiny = torch.finfo(energy_NE.dtype).tiny
    return energy_NE / energy_NE.sum(-1, keepdim=True).clamp_min(tiny)


def fit_router(
    x_NH: torch.Tensor,
    share_NE: torch.Tensor,
    generator: torch.Generator,
    *,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Minimise the cross-entropy between softmax(W x) and the given shares with Adam.

    Args:
        x_NH: inputs of the layer.
        share_NE: target distribution of each token.
        generator: draws the tokens of each step.
        steps: Adam steps; the learning rate falls from 1e-2 to 0.
        progress: told of each step.

    Returns:
        Router rows W [E, H], float32.
    """
    with torch.enable_grad():
        rows_EH = torch.zeros(share_NE.shape[1], x_NH.shape[1], device=x_NH.device, requires_grad=True)
        optimizer = torch.optim.Adam([rows_EH], lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in track(range(steps), "fitting the router", progress):
            pick_T = torch.randint(len(x_NH), (TOKENS_PER_STEP,), generator=generator).to(x_NH.device)
            logits_TE = x_NH[pick_T] @ rows_EH.T
            loss = -(share_NE[pick_T] * logits_TE.log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return rows_EH.detach()
