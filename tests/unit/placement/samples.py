"""Inputs shared by the placement tests: real counts, planted partitions, small traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from moekit.trace.store import Trace, TraceMeta
from moekit.trace.tokens import TokenLabels

COUNTS = Path(__file__).parents[2] / "fixtures" / "llama-moe-coactivation.safetensors"


def llama_moe() -> torch.Tensor:
    """Co-activation counts of LLaMA-MoE-3.5B (2 of 8 experts), 32 layers, 204,800 tokens each."""
    return load_file(COUNTS)["base"]


def planted(experts: int, devices: int, inside: float, outside: float, seed: int) -> tuple[torch.Tensor, list[int]]:
    """Poisson counts of a hidden partition, experts shuffled; and that partition."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(devices), experts // devices))
    mean_EE = np.where(truth[:, None] == truth[None, :], inside, outside)
    upper_EE = np.triu(rng.poisson(mean_EE), 1)
    return torch.tensor(upper_EE + upper_EE.T), truth.tolist()


def same_partition(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two labellings cut the experts alike."""
    return len(set(zip(first, second, strict=True))) == len(set(first)) == len(set(second))


def blocks(groups: Sequence[int]) -> set[frozenset[int]]:
    """Experts that share a device."""
    return {frozenset(e for e, d in enumerate(groups) if d == device) for device in set(groups)}


def skewed_choices(tokens: int, experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """Choices of a router with structure: a few hidden directions decide, with noise, [N, K]."""
    g = torch.Generator().manual_seed(seed)
    noise_NE = -torch.log(-torch.log(torch.rand(tokens, experts, generator=g).clamp(1e-6, 1 - 1e-6)))
    z_NE = 1.5 * torch.randn(tokens, 3, generator=g) @ torch.randn(3, experts, generator=g) + noise_NE
    return z_NE.topk(top_k).indices


def counts_of(indices_NK: torch.Tensor, experts: int) -> torch.Tensor:
    """Co-activation counts, diagonal = load, by the definition: one-hot sums."""
    hot_NE = torch.zeros(len(indices_NK), experts + 1).scatter_(1, indices_NK, 1.0)[:, :experts]
    return (hot_NE.T.double() @ hot_NE.double()).long()


def trace_of(
    choices: Mapping[int, torch.Tensor], experts: int, documents: int = 10, *, fingerprint: str = "model-a"
) -> Trace:
    """A trace of these choices, documents of nearly equal length."""
    tokens, top_k = next(iter(choices.values())).shape
    document_N = (torch.arange(tokens) * documents // max(tokens, 1)).int()
    labels = TokenLabels(
        sequence_N=document_N,
        document_N=document_N,
        domain_N=torch.zeros(tokens, dtype=torch.int16),
        position_N=torch.arange(tokens, dtype=torch.int32),
        phase_N=torch.zeros(tokens, dtype=torch.uint8),
    )
    meta = TraceMeta(
        fingerprint=fingerprint,
        layers=sorted(choices),
        experts=[experts] * len(choices),
        top_k=[top_k] * len(choices),
        hidden=8,
        tokens=tokens,
        has_choices=True,
        has_weights=False,
        domains=["all"],
    )
    return Trace(meta, labels, {layer: chosen.to(torch.uint8) for layer, chosen in choices.items()})
