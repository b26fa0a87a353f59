"""A small network that tells from what a block is given how far the block turns it (QuantMoE-Bench, arXiv:2406.08155).

Legend: N tokens, n tokens of a step, H hidden, P width of the network.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The paper's settings; its width is 1024 at any H.
WIDTH, RATE, DECAY, EPOCHS, PATIENCE, HELD = 1024, 1e-4, 0.01, 100, 5, 0.1
# Tokens of a step, and steps of an epoch at the least: a short text is learned from in smaller steps, not fewer.
_LEAST, _MOST, _STEPS = 16, 1024, 64


class CosineNet(nn.Module):
    """tanh(W2 relu(W1 x)), without biases: a cosine for each token.

    Args:
        hidden: H.
        generator: of the first weights.
    """

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        width = min(WIDTH, 4 * hidden)
        first_PH = torch.randn(width, hidden, generator=generator) / hidden**0.5
        self.first_PH = nn.Parameter(first_PH)
        self.second_P = nn.Parameter(torch.randn(width, generator=generator) / width**0.5)

    def forward(self, given_nH: Tensor) -> Tensor:
        """Cosines, [n]."""
        inner_nP = nn.functional.relu(given_nH.float() @ self.first_PH.T)
        return torch.tanh(inner_nP @ self.second_P)


@dataclass(frozen=True)
class Fitted:
    """A network that was trained.

    Attributes:
        net: with the weights of its best epoch.
        error: mean squared error on the tokens that were held out.
        variance: of their true cosines: what a constant would miss by.
    """

    net: CosineNet
    error: float
    variance: float

    @torch.no_grad()
    def mean(self, given_NH: Tensor) -> float:
        """Mean of the cosines that it tells of some tokens."""
        total = sum(float(self.net(part_nH.float()).double().sum()) for part_nH in torch.split(given_NH, 4096))
        return total / max(len(given_NH), 1)


def fit_cosines(given_NH: Tensor, cosine_N: Tensor, generator: torch.Generator, *, epochs: int = EPOCHS) -> Fitted:
    """Train a network on tokens whose cosines are known.

    A tenth of the tokens is held out; training ends where they were told no better for five epochs in a row.

    Args:
        given_NH: what the block is given.
        cosine_N: of that and what the block gives.
        generator: on the CPU, of first weights, held out tokens and their order.
        epochs: at most.
    """
    device = given_NH.device
    net = CosineNet(given_NH.shape[1], generator).to(device)
    order_N = torch.randperm(len(given_NH), generator=generator)
    held_n, order_N = order_N[: max(1, int(HELD * len(order_N)))], order_N[max(1, int(HELD * len(order_N))) :]
    rows = min(_MOST, max(_LEAST, len(order_N) // _STEPS))
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    best, since, kept = float("inf"), 0, copy.deepcopy(net)
    held = given_NH[held_n.to(device)].float(), cosine_N[held_n.to(device)].float()
    with torch.enable_grad():
        for _ in range(epochs):
            for rows_n in torch.split(order_N[torch.randperm(len(order_N), generator=generator)], rows):
                at_n = rows_n.to(device)
                loss = (net(given_NH[at_n].float()) - cosine_N[at_n].float()).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            error = float((net(held[0]) - held[1]).square().mean().detach())
            if error < best:
                best, since, kept = error, 0, copy.deepcopy(net)
                continue
            since += 1
            if since >= PATIENCE:
                break
    return Fitted(kept, best, float(held[1].var(unbiased=False)))
