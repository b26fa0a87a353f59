"""Random groups: the control that says how much any other grouping is worth.

Legend: E experts, M groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.merging import Groups, MergeMethod


@register(
    name="random-groups",
    kind="merge",
    needs=("load",),
    changes="weights",
    traits=("stochastic",),
    limits=("Looks at nothing but the load: one seed says little, compare with the mean and spread of several.",),
)
class RandomGroups(MergeMethod):
    """Merge experts that are thrown together at random, weighted by use, repeatable by the run's seed.

    A random order of the experts: the first M begin a group each, and each other joins one of them, all equally likely.
    Choose it as the control of a comparison, with several seeds: a grouping that does not beat it on the same budget
    has learnt nothing from its data.
    """

    def score(self, inputs: LayerInputs) -> Tensor:
        """The load."""
        return inputs.statistics.load_E.double()

    def groups(self, inputs: LayerInputs, scores_E: Tensor, count: int, experts: Sequence[int]) -> Groups:
        """M groups of a random order."""
        draw = inputs.generator("random-groups")
        order = [experts[i] for i in torch.randperm(len(experts), generator=draw).tolist()]
        made = [[expert] for expert in order[:count]]
        for expert, group in zip(
            order[count:], torch.randint(count, (len(order) - count,), generator=draw), strict=True
        ):
            made[int(group)].append(expert)
        return made
