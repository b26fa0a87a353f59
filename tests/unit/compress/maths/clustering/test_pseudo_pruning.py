"""Groups of which few are large, against a worked example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.compress.maths.clustering.pseudo_pruning import pseudo_pruning
from moekit.errors import BadConfig

WORTH = torch.tensor([0.9, 0.2, 0.7, 0.1, 0.5, 0.3])
SIMILARITY = {
    (0, 3): 0.9,
    (0, 5): 0.7,
    (0, 1): 0.6,
    (1, 2): 0.8,
    (2, 5): 0.9,
    (1, 4): 0.4,
    (3, 4): 0.6,
    (0, 2): 0.2,
    (0, 4): 0.3,
    (1, 3): 0.1,
    (1, 5): 0.2,
    (2, 3): 0.3,
    (2, 4): 0.5,
    (3, 5): 0.2,
    (4, 5): 0.1,
}


def distance() -> Tensor:
    made_EE = torch.zeros(6, 6)
    for (one, other), similarity in SIMILARITY.items():
        made_EE[one, other] = made_EE[other, one] = 1 - similarity
    return made_EE


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (2, ((0, 3), (2, 5), (4, 1))),
        (3, ((0, 3, 5), (2, 1), (4,))),
        (4, ((0, 3, 5, 1), (2,), (4,))),
        (0, ((0, 3), (2, 1, 5), (4,))),
    ],
)
def test_the_worked_example(size: int, groups: tuple[tuple[int, ...], ...]) -> None:
    assert pseudo_pruning(WORTH, distance(), 3, size) == groups


@pytest.mark.parametrize(("keep", "sizes"), [(96, [16, 16, 3] + [1] * 93), (64, [16] * 4 + [5] + [1] * 59)])
def test_most_of_those_kept_stay_alone(keep: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    made = pseudo_pruning(torch.rand(128, generator=generator), torch.rand(128, 128, generator=generator), keep, 16)
    assert [len(group) for group in made] == sizes
    assert sorted(expert for group in made for expert in group) == list(range(128))


def test_ties_go_to_the_lower_number() -> None:
    assert pseudo_pruning(torch.ones(5), torch.zeros(5, 5), 2, 3) == ((0, 2, 3), (1, 4))
    assert pseudo_pruning(torch.ones(5), torch.zeros(5, 5), 2, 0) == ((0, 2, 3, 4), (1,))


def test_groups_that_are_too_small_are_refused_and_the_way_out_is_one() -> None:
    with pytest.raises(BadConfig, match="3 groups of at most 1 experts do not hold 6") as found:
        pseudo_pruning(WORTH, distance(), 3, 1)
    assert "group_size=2" in str(found.value.hint)
    assert pseudo_pruning(WORTH, distance(), 3, 2)
    assert pseudo_pruning(WORTH, distance(), 6, 1) == ((0,), (2,), (4,), (5,), (1,), (3,))
