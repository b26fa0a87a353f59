"""OWL's shares of sparsity against the worked example and scores counted one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moekit.anatomy import Geometry
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.sparsify.magnitude import Magnitude
from moekit.compress.sparsify.owl import OWL, outlier_share, owl_sparsities
from moekit.compress.sparsify.wanda import Wanda
from moekit.compress.weights import LayerWeights
from moekit.errors import BadData
from moekit.trace.statistics import LayerStatistics


def sample(seed: int, tail: float, experts: int = 3, width: int = 6, hidden: int = 10) -> LayerInputs:
    """A layer whose weights have the more outliers the larger `tail`; its last expert saw no token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator)
        return drawn.sign() * drawn.abs() ** tail

    weights = LayerWeights(
        up_EIH=draw(experts, width, hidden),
        down_EHI=draw(experts, hidden, width),
        gate_EIH=draw(experts, width, hidden),
    )
    load = torch.arange(experts).flip(0) * 7
    values = {
        "load": load,
        "input_square": draw(experts, hidden).square() * load[:, None],
        "inner_square": draw(experts, width).square() * load[:, None],
    }
    geometry = Geometry(hidden, experts, 2, width, 0, True, False, False, True)
    stats = LayerStatistics(experts, hidden, values=values, width=width)
    return LayerInputs(seed, geometry, stats, lambda: weights)


def counted(seen: LayerInputs, multiple: float) -> float:
    """D by the definition: all scores in one list, in Python's floats."""
    weights, scores = seen.weights, []
    for expert in range(weights.experts):
        tokens = int(seen.statistics["load"][expert])
        if tokens == 0:
            continue
        for stacked, squares in (
            (weights.gate_EIH, seen.statistics["input_square"]),
            (weights.up_EIH, seen.statistics["input_square"]),
            (weights.down_EHI, seen.statistics["inner_square"]),
        ):
            assert stacked is not None
            for row in stacked[expert].tolist():
                scores += [abs(w) * (s / tokens) ** 0.5 for w, s in zip(row, squares[expert].tolist(), strict=True)]
    mean = sum(scores) / len(scores)
    return 100 * sum(score > multiple * mean for score in scores) / len(scores)


def test_worked_example() -> None:
    assert owl_sparsities([3, 6, 9, 4], 0.6, 0.08) == pytest.approx([0.666667, 0.586667, 0.506667, 0.64], abs=1e-6)


def test_equal_outliers_give_one_sparsity() -> None:
    assert owl_sparsities([2.5, 2.5, 2.5], 0.7, 0.08) == [0.7, 0.7, 0.7]


@settings(max_examples=100, deadline=None)
@given(
    shares=st.lists(st.floats(0, 100), min_size=1, max_size=8),
    sparsity=st.floats(0, 0.99),
    strength=st.floats(0, 0.4),
    seed=st.integers(0, 99),
)
def test_the_mean_is_exact_and_all_are_possible(
    shares: list[float], sparsity: float, strength: float, seed: int
) -> None:
    plain = owl_sparsities(shares, sparsity, strength)
    assert sum(plain) / len(plain) == pytest.approx(sparsity, abs=1e-12)
    sizes = torch.randint(1, 1000, (len(shares),), generator=torch.Generator().manual_seed(seed)).tolist()
    weighed = owl_sparsities(shares, sparsity, strength, sizes)
    total = sum(s * n for s, n in zip(weighed, sizes, strict=True))
    assert total / sum(sizes) == pytest.approx(sparsity, abs=1e-12)
    for found in (plain, weighed):
        assert all(0 <= s <= 1 - (1 - sparsity) / 10 + 1e-12 for s in found)
        assert max(found) - min(found) <= 2 * strength + 1e-12
        # More outliers, fewer zeros.
        order = sorted(range(len(shares)), key=lambda place: shares[place])
        assert all(found[a] >= found[b] - 1e-12 for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("multiple", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("tail", [1.0, 3.0])
def test_outliers_are_counted_over_all_matrices(multiple: float, tail: float) -> None:
    seen = sample(1, tail)
    expected = counted(seen, multiple)
    assert outlier_share(seen.weights, seen, multiple) == pytest.approx(expected, abs=1e-9)
    assert expected > 0 or tail == 1.0


def test_layers_share_by_their_outliers() -> None:
    seen = {0: sample(0, 1.0), 3: sample(3, 3.0), 4: sample(4, 2.0, experts=2)}
    method = OWL()
    shares = method.share(seen, 0.6)
    assert not any("weights" in vars(s) for s in seen.values())  # no more than one layer is held
    outliers = {layer: counted(s, 3.0) for layer, s in seen.items()}
    sizes = {layer: s.experts for layer, s in seen.items()}  # all experts are of one size
    low, high = min(outliers.values()), max(outliers.values())
    raised = {layer: 0.16 * (d - low) / (high - low) for layer, d in outliers.items()}
    mean = sum(raised[n] * sizes[n] for n in seen) / sum(sizes.values())
    assert shares == pytest.approx({n: 0.6 - raised[n] + mean for n in seen})
    assert sum(shares[n] * sizes[n] for n in seen) / sum(sizes.values()) == pytest.approx(0.6, abs=1e-12)
    assert shares[0] > shares[3]
    assert method.share({0: seen[0]}, 0.6) == {0: 0.6}


def test_within_a_layer_it_is_wanda_or_magnitude() -> None:
    seen = sample(2, 1.0)
    for method, within in ((OWL(), Wanda()), (OWL(score="magnitude"), Magnitude())):
        ours, theirs = (m.zeros(seen.weights, seen, 0.4) for m in (method, within))
        assert torch.equal(ours.up_EIH, theirs.up_EIH)
        assert torch.equal(ours.down_EHI, theirs.down_EHI)
    assert OWL().sequential
    assert not OWL(score="magnitude").sequential
    assert OWL(score="magnitude").required == OWL().required


def test_a_layer_without_tokens_is_named() -> None:
    seen = sample(0, 1.0, experts=1)
    with pytest.raises(BadData, match="no token") as caught:
        OWL().share({0: seen}, 0.5)
    assert caught.value.layer == 0
