"""Keep equally many experts of each routing group, so that the router's limits to groups stay what they were.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moekit.anatomy.probe import Geometry
from moekit.checkpoint.names import config_groups
from moekit.compress.engine.dropping import PruneMethod, ranking
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.method import WeightMethod
from moekit.compress.engine.plan import LayerRecord, WeightPlan
from moekit.errors import BadConfig


def routing_groups(config: Mapping[str, Any]) -> int:
    """Groups of neighbouring experts that a router chooses among first; 1 without.

    Args:
        config: parsed config.json.
    """
    return config_groups(config)[0]


def check_grouping(method: WeightMethod[Any, Any], name: str, keep: Mapping[int, int], groups: int) -> None:
    """Refuse what cannot keep equally many experts of each group.

    Args:
        method: the method.
        name: its name.
        keep: decoder layer -> experts that stay.
        groups: number of routing groups.

    Raises:
        BadConfig: the number does not divide, or the method does not rank.
    """
    if type(method).decide is not PruneMethod.decide or method.searches:
        raise BadConfig(
            f"{name} decides in its own way, and not of each of the {groups} routing groups apart",
            hint="use a method that ranks by a score, or route without groups (--groups free)",
        )
    for layer, count in keep.items():
        if count % groups:
            near = [n for n in (count - count % groups, count - count % groups + groups) if n > 0]
            raise BadConfig(
                f"{count} experts are not equally many in {groups} routing groups",
                layer=layer,
                hint=f"keep {' or '.join(map(str, near))}, or route without groups (--groups free)",
            )


def by_group(plan: WeightPlan, geometries: Mapping[int, Geometry], groups: int) -> dict[int, LayerRecord]:
    """The layers of a plan with the best of each group kept instead of the best of all.

    Args:
        plan: made by a method that ranks by a score.
        geometries: decoder layer -> sizes.
        groups: number of routing groups.

    Raises:
        BadConfig: a group has more protected experts than may stay in it.
    """
    layers: dict[int, LayerRecord] = {}
    for layer, told in plan.file.layers.items():
        size, share = told.experts // groups, len(told.outcome.keep) // groups
        protected = frozenset(plan.file.protected.get(layer, ()))
        inputs = LayerInputs(layer, geometries[layer], plan.statistics[layer], protected=protected)
        ranked_E = ranking(torch.tensor(told.scores, dtype=torch.float64), inputs)
        kept: list[int] = []
        for first in range(0, told.experts, size):
            fixed = sum(first <= expert < first + size for expert in protected)
            if fixed > share:
                raise BadConfig(
                    f"{fixed} experts of routing group {first // size} are protected, but {share} of each may stay",
                    layer=layer,
                    hint="keep more, protect fewer, or route without groups (--groups free)",
                )
            best = ranked_E[first : first + size].sort(descending=True, stable=True).indices[:share]
            kept += [first + expert for expert in best.tolist()]
        outcome = told.outcome.model_copy(update={"keep": tuple(sorted(kept))})
        layers[layer] = told.model_copy(update={"outcome": outcome})
    return layers
