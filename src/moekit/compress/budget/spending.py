"""Take from layers, one by one, where it costs least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moekit.errors import BadConfig


def spend(
    cost: Callable[[int, int], float],
    *,
    start: Mapping[int, int],
    lowest: Mapping[int, int],
    total: int,
    span: int = 0,
) -> dict[int, int]:
    """Counts of layers that sum to a total: one is taken away where the cost rises least, again and again.

    Layers that stand together share a part of the total by their starts, rounded so that all parts together are the
    total; where bounds keep a part from being reached, the rest is taken anywhere.

    Args:
        cost: of a layer at a count.
        start: counts that layers have before anything is taken.
        lowest: counts below which layers do not go.
        total: what is left in the end; no more than the starts together.
        span: layers in a row that share a part; 0 shares all of it among all.

    Returns:
        Layer -> count. Of equal costs the lower layer gives.

    Raises:
        BadConfig: the lowest counts are more than the total.
    """
    if (least := sum(lowest.values())) > total:
        raise BadConfig(f"{total} experts cannot stay: what must stay is {least}", hint="keep more, or protect fewer")
    counts, layers = dict(start), sorted(start)
    whole, passed, given = sum(start.values()), 0, 0
    size = span or len(layers)
    for first in range(0, len(layers), size):
        together = layers[first : first + size]
        passed += sum(start[layer] for layer in together)
        part, given = round(total * passed / whole) - given, round(total * passed / whole)
        _take(cost, counts, together, lowest, part)
    _take(cost, counts, layers, lowest, total)
    return counts


def _take(
    cost: Callable[[int, int], float],
    counts: dict[int, int],
    layers: Sequence[int],
    lowest: Mapping[int, int],
    total: int,
) -> None:
    while sum(counts[layer] for layer in layers) > total:
        able = [layer for layer in layers if counts[layer] > lowest[layer]]
        if not able:
            return
        rise = {layer: cost(layer, counts[layer] - 1) - cost(layer, counts[layer]) for layer in able}
        counts[min(able, key=lambda layer: (rise[layer], layer))] -= 1
