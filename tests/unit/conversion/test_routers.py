"""Fitted routers approach the shares they are fitted to; clustered ones are balanced and tell kinds of input apart."""

from __future__ import annotations

import torch

from moekit.conversion.methods.residual import cluster_router, dealt_neurons, strong_neurons
from moekit.conversion.router_fit import energy_shares, fit_router


class Counter:
    def __init__(self) -> None:
        self.events: list[object] = []

    def start(self, label: str, total: int | None) -> None:
        self.events.append((label, total))

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.events.append(amount)

    def finish(self) -> None:
        self.events.append("end")


def test_shares_by_hand() -> None:
    shares = energy_shares(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    assert shares.tolist() == [[0.25, 0.75], [0.0, 0.0]]


def test_a_linear_teacher_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 0.5 * torch.randn(6, 16, generator=generator)
    x = torch.randn(2000, 16, generator=generator)
    shares = (x @ teacher.T).softmax(-1)
    progress = Counter()
    rows = fit_router(x, shares, generator, progress=progress)
    kept = (x @ rows.T).topk(2).indices.sort().values == shares.topk(2).indices.sort().values
    assert kept.all(1).float().mean() > 0.8
    uniform = float(torch.log(torch.tensor(6.0)))
    loss = -(shares * (x @ rows.T).log_softmax(-1)).sum(-1).mean()
    entropy = -(shares * shares.log()).sum(-1).mean()
    assert loss - entropy < 0.05 * (uniform - entropy)
    assert progress.events == [("fitting the router", 200), *[1] * 200, "end"]


def test_clustered_rows_ignore_the_mean_and_separate_kinds() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = 30 * torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    kinds = 3 * torch.randn(4, 32, generator=generator)
    label = torch.arange(4).repeat_interleave(400)
    x = mean + kinds[label] + torch.randn(1600, 32, generator=generator)
    rows, cluster = cluster_router(x, 16, logit_std=2.0, generator=generator)
    assert torch.bincount(cluster).tolist() == [100] * 16
    unit_mean = torch.nn.functional.normalize(x.mean(0), dim=0)
    assert (rows @ unit_mean).abs().max() < 1e-5 * rows.norm()
    assert torch.allclose((x @ rows.T).std(), torch.tensor(2.0), rtol=1e-3)
    chosen = (x @ rows.T).topk(2).indices
    load = torch.bincount(chosen.flatten(), minlength=16).float()
    assert load.max() / load.mean() < 2.5
    assert load.min() > 0
    used = torch.stack([torch.bincount(chosen[label == k].flatten(), minlength=16) for k in range(4)]).float()
    assert (used.max(0).values / used.sum(0)).mean() > 0.8, "most experts serve one kind of input"


def test_strong_neurons_follow_their_cluster() -> None:
    strength = torch.ones(40, 8)
    cluster = torch.arange(4).repeat(10)
    for expert in range(4):
        strength[cluster == expert, 2 * expert : 2 * expert + 2] = 9.0
    assert strong_neurons(strength, cluster, 4, 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert strong_neurons(strength, cluster, 4, 3)[:, :2].sort(1).values.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_dealt_neurons_are_distinct_within_a_hand_and_even_over_all() -> None:
    generator = torch.Generator().manual_seed(0)
    hands = dealt_neurons(48, 8, 6, generator)
    assert sorted(hands.flatten().tolist()) == list(range(48))
    for width in (5, 7, 48):
        hands = dealt_neurons(48, 8, width, generator)
        assert all(len(set(hand.tolist())) == width for hand in hands)
    assert torch.bincount(dealt_neurons(48, 8, 7, generator).flatten(), minlength=48).max() <= 3
