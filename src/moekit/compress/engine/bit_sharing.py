"""From a mean number of bits to a width for each expert, before anything is rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from moekit import catalogue
from moekit._progress import Progress
from moekit.anatomy.probe import Geometry
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.bits import FEWEST, MOST, BitBudget, check_mean
from moekit.compress.engine.inputs import InputsByLayer
from moekit.compress.engine.measuring import empty_statistics, geometries_of, weights_reader
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.rewriting import PlannedRewrite
from moekit.compress.engine.sharing import BitSharer, Room, Shares, WidthErrors, read_sharer
from moekit.compress.engine.width_errors import measure
from moekit.errors import BadConfig
from moekit.trace.statistics import LayerStatistics

# What rounds the model as a request says whose bits are shared.
Round = Callable[[PlanRequest], PlannedRewrite]


def with_widths(
    checkpoint: Checkpoint,
    source: object,
    request: PlanRequest,
    progress: Progress | None = None,
    rounded: Round | None = None,
) -> PlanRequest:
    """The request with a width for each expert, where its budget is a mean that has not been shared yet.

    Args:
        checkpoint: the model.
        source: a text; anything else is no help to sharers that decide from one.
        request: of a method that rounds.
        progress: told layer by layer.
        rounded: rounds the model, for sharers that measure again on what they made of it.

    Raises:
        BadConfig: the mean cannot be shared so, or there is no text where the sharer needs one.
    """
    budget = request.budget
    if not isinstance(budget, BitBudget) or budget.mean is None or budget.widths is not None:
        return request
    sharer, geometries = read_sharer(budget.share), geometries_of(checkpoint)
    check_share(sharer, budget)
    statistics, errors = empty_statistics(geometries), dict[int, WidthErrors]()
    before: PlanRequest | None = None
    for mean in sharer.means(budget.mean, budget.choices):
        if sharer.needs_text:
            if not isinstance(source, CalibrationText):
                raise BadConfig(f"{name_of(sharer)} shares bits by what a text shows", hint="give text (--data)")
            behind = None if before is None or rounded is None else rounded(before)
            statistics, errors = measure(checkpoint, source, request, sharer, budget.choices, progress, behind)
        now = budget.model_copy(update={"mean": mean})
        widths = _share(sharer, checkpoint, request, statistics, errors, room_of(now, geometries))
        before = dataclasses.replace(request, budget=now.model_copy(update={"widths": widths}))
    assert before is not None  # there is a round at least, and the last has the mean that was asked for
    return before


def room_of(budget: BitBudget, geometries: Mapping[int, Geometry]) -> Room:
    """What is to be shared among the experts of a model."""
    assert budget.mean is not None
    sizes = {n: g.hidden * g.width * (3 if g.has_gate else 2) for n, g in geometries.items()}
    return Room(budget.mean, budget.choices, budget.unit, sizes, {n: g.experts for n, g in geometries.items()})


def name_of(sharer: BitSharer) -> str:
    """Its name in the catalogue."""
    return catalogue.of(type(sharer)).name


def check_share(sharer: BitSharer, budget: BitBudget) -> None:
    """Refuse a share that nothing could meet, before any work.

    Raises:
        BadConfig: names what can be asked for.
    """
    if budget.unit not in sharer.units:
        raise BadConfig(
            f"{name_of(sharer)} tells experts of a layer apart, and each {budget.unit} is to have one width",
            hint=f"say --unit {sharer.units[0]}, or share by pmq, gemq, blocks or layers",
        )
    assert budget.mean is not None
    if name_of(sharer) != "uniform":
        check_mean(budget.mean, budget.choices)
    sharer.means(budget.mean, budget.choices)


def _share(
    sharer: BitSharer,
    checkpoint: Checkpoint,
    request: PlanRequest,
    statistics: Mapping[int, LayerStatistics],
    errors: Mapping[int, WidthErrors],
    room: Room,
) -> Shares:
    geometries = geometries_of(checkpoint)
    read = weights_reader(checkpoint) if sharer.reads_weights else None
    widths = sharer.share(InputsByLayer(geometries, statistics, read, request.seed), errors, room)
    for layer, geometry in geometries.items():
        own = widths.get(layer, ())
        if len(own) != geometry.experts or not all(FEWEST <= n <= MOST for n in own):
            raise BadConfig(f"{name_of(sharer)} gave no width of 1 to 8 bits for each expert", layer=layer)
    spent = sum(room.sizes[n] * sum(widths[n]) for n in geometries)
    if spent > room.of_model:
        weights = sum(room.sizes[n] * room.experts[n] for n in geometries)
        raise BadConfig(f"{name_of(sharer)} gave {spent / weights:g} bits a weight, more than {room.mean:g}")
    return {layer: tuple(widths[layer]) for layer in geometries}
