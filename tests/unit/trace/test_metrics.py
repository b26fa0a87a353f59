"""Figures of collaboration, load and domains against published counts and other libraries."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from moekit.errors import BadConfig, BadData
from moekit.trace import (
    collaboration,
    domain_divergence,
    domain_information,
    domain_report,
    load_balance,
    mean_collaboration,
)
from moekit.trace.domains import choose_unit, unit_loads

COUNTS = Path(__file__).parents[2] / "fixtures" / "llama-moe-coactivation.safetensors"


def test_published_counts_of_llama_moe() -> None:
    base_LEE = load_file(COUNTS)["base"]
    assert bool((base_LEE.triu(1).sum((1, 2)) == 204_800).all())
    layers = [collaboration(counts_EE) for counts_EE in base_LEE]
    mean = mean_collaboration(layers)
    assert round(mean.entropy, 3) == 1.210
    assert round(mean.normalised_entropy, 3) == 0.622
    assert round(mean.effective_partners, 2) == 3.46
    assert round(mean.degree, 2) == 6.91
    assert round(mean.degree_5_percent, 2) == 3.64
    assert round(mean.top_partner_share, 3) == 0.524
    assert round(mean.load.cv, 3) == 0.132
    assert round(mean.load.max_over_mean, 2) == 1.27
    assert mean.never_routed == 0


def test_collaboration_by_hand() -> None:
    counts_EE = torch.tensor([[6, 3, 3, 0], [3, 4, 1, 0], [3, 1, 4, 0], [0, 0, 0, 0]])
    found = collaboration(counts_EE)
    one = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found.entropy == pytest.approx((math.log(2) + 2 * one) / 3)
    assert found.normalised_entropy == pytest.approx(found.entropy / math.log(3))
    assert found.effective_partners == pytest.approx((2 + 2 * math.exp(one)) / 3)
    assert found.degree == found.degree_5_percent == 2
    assert found.top_partner_share == pytest.approx((0.5 + 0.75 + 0.75) / 3)
    assert found.never_routed == found.load.never_routed == 1
    assert found.load.max_over_mean == pytest.approx(6 / 3.5)
    assert found.load.cv == pytest.approx(np.std([6, 4, 4, 0]) / 3.5)


def test_load_of_counts_without_diagonal_is_their_row_sum() -> None:
    counts_EE = torch.tensor([[6, 3, 3], [3, 4, 1], [3, 1, 4]])
    bare_EE = counts_EE.clone().fill_diagonal_(0)
    assert collaboration(bare_EE).load == load_balance(torch.tensor([6, 4, 4]))
    assert collaboration(bare_EE).entropy == collaboration(counts_EE).entropy


def test_an_even_load() -> None:
    found = load_balance(torch.full((5,), 7))
    assert (found.cv, found.max_over_mean, found.never_routed) == (0.0, 1.0, 0)
    assert found.entropy == pytest.approx(1.0)


def test_nothing_to_describe_is_an_error_not_nan() -> None:
    with pytest.raises(BadData, match="no expert was ever chosen"):
        load_balance(torch.zeros(4))
    with pytest.raises(BadData, match="fired together"):
        collaboration(torch.diag(torch.tensor([3, 2, 1])))
    with pytest.raises(BadData):
        mean_collaboration([])


def test_information_equals_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    domain_N, expert_N = rng.integers(0, 4, 500), rng.integers(0, 6, 500)
    expert_N = np.where(rng.random(500) < 0.4, domain_N, expert_N)
    counts_DE = torch.zeros(4, 6, dtype=torch.int64)
    for d, e in zip(domain_N, expert_N, strict=True):
        counts_DE[d, e] += 1
    information, normalised = domain_information(counts_DE)
    assert float(information) == pytest.approx(mutual_info_score(domain_N, expert_N))
    assert float(normalised) == pytest.approx(normalized_mutual_info_score(domain_N, expert_N))


def test_information_at_its_ends() -> None:
    assert float(domain_information(torch.eye(3) * 5)[1]) == pytest.approx(1.0)
    assert float(domain_information(torch.ones(3, 4))[1]) == pytest.approx(0.0, abs=1e-12)
    assert float(domain_information(torch.zeros(3, 4))[1]) == 0.0


def test_divergence_equals_that_of_scipy() -> None:
    counts_DE = torch.tensor([[5, 1, 0, 2], [1, 1, 7, 0], [5, 1, 0, 2]])
    found_DD = domain_divergence(counts_DE)
    share = (counts_DE / counts_DE.sum(1, keepdim=True)).numpy()
    for i in range(3):
        for j in range(3):
            assert float(found_DD[i, j]) == pytest.approx(jensenshannon(share[i], share[j], base=2) ** 2, abs=1e-6)
    assert float(domain_divergence(torch.tensor([[3, 0], [0, 9]]))[0, 1]) == pytest.approx(1.0)


def documents(shift: float, seed: int, experts: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """40 documents of 2 domains, 30 tokens each; every document has habits of its own, domains differ by `shift`."""
    g = torch.Generator().manual_seed(seed)
    habit_UE = torch.randn(40, experts, generator=g)
    habit_UE[20:, : experts // 2] += shift
    document_N = torch.arange(40).repeat_interleave(30)
    noise_NE = -torch.log(-torch.log(torch.rand(1200, experts, generator=g)))
    return (habit_UE[document_N] + noise_NE).topk(2).indices, document_N // 20, document_N


def test_domains_that_differ_are_told_apart_and_equal_ones_are_not() -> None:
    apart = domain_report(*documents(2.0, 0), 8, permutations=199)
    assert apart.p_value == pytest.approx(1 / 200)
    assert apart.normalised > 3 * apart.shuffled_high
    assert apart.excess == pytest.approx(apart.normalised - apart.shuffled)
    alike = [domain_report(*documents(0.0, seed), 8, permutations=99).p_value for seed in range(20)]
    # Under equal domains p-values are uniform: 20 draws below 0.05 three times or fewer, with probability 0.98.
    assert sum(p <= 0.05 for p in alike) <= 3
    assert max(alike) > 0.5


def test_shuffling_tokens_instead_of_documents_would_mislead() -> None:
    choices_NK, domain_N, document_N = documents(0.0, 3)
    by_token = domain_report(choices_NK, domain_N, torch.arange(1200), 8, permutations=99)
    by_document = domain_report(choices_NK, domain_N, document_N, 8, permutations=99)
    assert by_token.p_value == pytest.approx(0.01)  # habits of documents pass for a difference of domains
    assert by_document.p_value > 0.05


def test_report_is_the_same_for_equal_seeds() -> None:
    parts = documents(0.3, 1)
    assert domain_report(*parts, 8, seed=4) == domain_report(*parts, 8, seed=4)
    assert domain_report(*parts, 8, seed=4) != domain_report(*parts, 8, seed=5)


def test_a_sequence_of_two_domains_is_two_units() -> None:
    choices_NK = torch.tensor([[0], [0], [1], [1], [0], [1]])
    domain_N = torch.tensor([0, 0, 1, 1, 0, 1])
    report = domain_report(choices_NK, domain_N, torch.tensor([0, 0, 0, 0, 1, 1]), 2, unit="sequence", permutations=9)
    assert report.units == 4
    assert report.normalised == pytest.approx(1.0)


def test_too_little_to_shuffle() -> None:
    two_NK = torch.tensor([[0], [1]])
    with pytest.raises(BadData, match="cannot show"):
        domain_report(two_NK, torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
    with pytest.raises(BadData, match="cannot show"):
        domain_report(two_NK, torch.tensor([0, 0]), torch.tensor([0, 1]), 2)
    with pytest.raises(BadConfig, match="permutations"):
        domain_report(two_NK, torch.tensor([0, 1]), torch.tensor([0, 1]), 2, permutations=0)


def test_unit_loads_and_choice_of_unit() -> None:
    loads_UE = unit_loads(torch.tensor([[0, 2], [1, 3], [0, 1]], dtype=torch.uint8), torch.tensor([9, 4, 9]), 3)
    assert loads_UE.tolist() == [[0, 1, 0], [2, 1, 1]]
    assert choose_unit(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1])) == "document"
    assert choose_unit(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 1])) == "sequence"
