"""Groups of which few are large: the most valuable experts take all that are not kept (REAM, arXiv:2604.04356).

Legend: E experts.
"""

from __future__ import annotations

import math

from torch import Tensor

from moekit.errors import BadConfig

Groups = tuple[tuple[int, ...], ...]


def pseudo_pruning(worth_E: Tensor, distance_EE: Tensor, keep: int, size: int) -> Groups:
    """Keep the most valuable experts, and give each other one to one of them.

    From the most valuable of the kept ones down, each takes its nearest experts that are neither kept nor taken, until
    its group is full or none is left: so most of those that are kept stay alone. With `size` 0 there is no limit, and
    each expert goes to the nearest of the kept ones, as in MC-SMoE (arXiv:2310.01334). Of equally valuable or equally
    near experts the lower number is first.

    Args:
        worth_E: how much each expert is worth.
        distance_EE: between experts; the diagonal is ignored.
        keep: groups, at least 1.
        size: experts of a group at most, the kept one counted; 0 for any number.

    Returns:
        Groups from the most valuable kept expert down, which is the first of its group; members as they were taken.

    Raises:
        BadConfig: so many groups of this size do not hold all experts; names a size and a number that do.
    """
    experts = len(worth_E)
    if size and keep * size < experts:
        raise BadConfig(
            f"{keep} groups of at most {size} experts do not hold {experts}",
            hint=f"let groups hold {math.ceil(experts / keep)} (--set group_size={math.ceil(experts / keep)}), or keep "
            f"at least {math.ceil(experts / size)}",
        )
    order = worth_E.double().sort(descending=True, stable=True).indices.tolist()
    kept, free = order[:keep], sorted(order[keep:])
    distance = distance_EE.double().tolist()
    groups = {expert: [expert] for expert in kept}
    if not size:
        for expert in free:
            nearest = min(kept, key=lambda centre: (distance[expert][centre], centre))
            groups[nearest].append(expert)
        return tuple(tuple(groups[expert]) for expert in kept)
    for centre in kept:
        taken = sorted(free, key=lambda expert: (distance[centre][expert], expert))[: size - 1]
        groups[centre] += taken
        free = [expert for expert in free if expert not in taken]
    return tuple(tuple(groups[expert]) for expert in kept)
