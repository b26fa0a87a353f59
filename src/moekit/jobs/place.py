"""`use: place`: decide which device holds which expert, and count by replay what is sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from moekit import catalogue
from moekit.checkpoint import Checkpoint, atomic_folder
from moekit.errors import BadConfig
from moekit.jobs.call import JobResult, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.place import PlaceOptions
from moekit.jobs.shared.inputs import changed_bytes, model_item, model_location
from moekit.jobs.shared.trained import trained_alike
from moekit.placement import Placement, constraint_gain, routing_groups
from moekit.placement.apply import place_checkpoint
from moekit.placement.comparison import compare, place_repeatedly
from moekit.placement.redundancy import add_copies, place_by_load
from moekit.placement.sending import predict_sending
from moekit.placement.simulation import place_trace, statistics_of
from moekit.placement.topology import Topology, parse_latency
from moekit.progress import ProgressLike
from moekit.report.results import REPLAY, placement_file
from moekit.trace import Trace


class PlaceResult(JobResult):
    """Placements, and the rows they send.

    Attributes:
        method: the solver.
        routing: the policy under which the trace was taken.
        trace: hash of the trace that was replayed.
        devices: for each number of devices: the placement, rows sent by it and by others, gain, predictions.
    """

    method: str
    routing: str
    trace: str
    devices: list[dict[str, Any]]


def place(
    trace: str | Path,
    *,
    method: str = "auto",
    settings: Mapping[str, Any] | None = None,
    devices: Sequence[int] = (2,),
    nodes: int = 1,
    replay: str | Path | None = None,
    other_weights: bool = False,
    compare: Sequence[str] = (
        "contiguous",
        "random",
    ),
    baseline: str | Path | None = None,
    baseline_trace: str | Path | None = None,
    model: str | Path | None = None,
    bandwidth: str | None = None,
    latency: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    redundant: int = 0,
    copies: Literal["added", "eplb"] = "added",
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> PlaceResult:
    """Place experts on devices, layer by layer, for several numbers of devices, and replay a trace to count rows.

    Args:
        trace: trace that the placement is made for.
        method: solver; see moekit methods place; auto: exact where it can be.
        settings: the solver's own options.
        devices: numbers of devices to place on.
        nodes: nodes that the devices stand in.
        replay: trace to count rows on, of this model or of one tuned from it; the same by default.
        other_weights: replay although the trace is of a model that is not known to be made from this one.
        compare: other solvers to count for, too.
        baseline: folder of another place step, of the free model.
        baseline_trace: trace of the free model on the same documents.
        model: write this model with its experts in device order.
        bandwidth: of a link inside a node, then across nodes, such as 900GB/s,50GB/s: predict bytes and seconds.
        latency: before the first byte, inside a node, then across, such as 3us,10us.
        dtype: type of the hidden states that travel, for predicted bytes.
        redundant: expert slots of each device to fill with copies of hot experts.
        copies: added: keep the solver's owners; eplb: choose owners, too, by load alone. Both are counted, this one is
            written.
        out: folder of the placements and counts; None keeps nothing but the result.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit place` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(PlaceOptions, PlaceResult, dict(locals()))


def check(options: PlaceOptions) -> None:
    """Refuse an unknown solver and impossible options."""
    for name in {options.method, *options.compare} - {"auto"}:
        catalogue.make("place", name, options.settings if name == options.method else {})
    for devices in options.devices:
        _topology(options, devices)


def estimate(options: PlaceOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Placements are small; a permuted model is as large as its parent."""
    others = [
        sizes.item(path) for path in (options.trace, options.replay, options.baseline, options.baseline_trace) if path
    ]
    written: int | None = 1 << 16
    memory = sum(item.nbytes or 0 for item in others) or None
    if options.model is not None:
        model = model_item(options.model, sizes)
        others.append(model)
        each = changed_bytes(options.model, model)
        written = None if each is None else (1 << 16) + each * len(options.devices)
    return JobEstimate(tuple(others), (Item(str(out), written),), disk=written, memory=memory)


def run(options: PlaceOptions, context: JobContext) -> dict[str, Any]:
    """Solve, replay, write `placement-D.json` for each D."""
    trace = Trace.load(options.trace)
    measured = trace
    if options.replay is not None:
        measured = Trace.load(options.replay)
        if not options.other_weights:
            measured.check_descent(trace)
        # The placement is for the model that is replayed; it is planned on a trace of what that was tuned from.
        trace.meta = trace.meta.model_copy(update={"fingerprint": measured.meta.fingerprint})
    results: dict[str, Any] = {"method": options.method, "routing": measured.meta.routing, "trace": measured.digest}
    results["devices"] = []
    with atomic_folder(context.out, overwrite=context.overwrite) as folder:
        for devices in options.devices:
            results["devices"].append(_on(options, devices, trace, measured, folder, context))
        (folder / REPLAY).write_text(json.dumps(results, indent=1) + "\n")
    return results


def _on(
    options: PlaceOptions, devices: int, trace: Any, measured: Any, folder: Path, context: JobContext
) -> dict[str, Any]:
    groups = _routing_groups(options)
    how: dict[str, Any] = {"nodes": options.nodes, "routing_groups": groups, "seed": context.seed}
    placement = place_trace(
        trace, devices, solver=options.method, config=options.settings, progress=context.progress, **how
    )
    placements = {options.method: placement, **_with_copies(options, trace, placement, groups)}
    # The one that is written comes last: later steps read it there.
    *_, placement = placements.values()
    placement.save(folder / placement_file(devices))
    rows = compare(measured, placements).as_dicts()
    others = _others(options, devices, trace, dict(how))
    if others:
        rows = [*compare(measured, others).as_dicts(), *rows]
    if options.model is not None:
        target = folder / f"model-{devices}"
        location = model_location(options.model, context.progress)
        place_checkpoint(location, placement, target, command=context.command, progress=context.progress)
    topology = _topology(options, devices)
    placements = {**{name: placed[0] for name, placed in others.items()}, **placements}
    return {
        "devices": devices,
        "placement": placement.hash,
        "solver": placement.solver,
        "redundant": options.redundant,
        "proven_layers": len(placement.proven),
        "layers": len(placement.layers),
        "rows": rows,
        "gain": _gain(options, devices, measured, placement, context.seed),
        "links": None if topology is None else {**topology.model_dump(), "dtype": options.dtype},
        "predictions": [] if topology is None else _predictions(options, measured, placements, topology),
    }


def _others(options: PlaceOptions, devices: int, trace: Any, how: dict[str, Any]) -> dict[str, list[Placement]]:
    """Placements to compare with, by solver: of one that draws numbers several."""
    seed = how.pop("seed")
    statistics = statistics_of(trace) if options.compare else None
    return {
        name: place_repeatedly(trace, devices, name, seed=seed, options=how, statistics=statistics)
        for name in options.compare
    }


def _topology(options: PlaceOptions, devices: int) -> Topology | None:
    """Links to predict for; None where no bandwidth is given.

    Raises:
        BadConfig: an unreadable bandwidth or latency, more nodes than devices, or a latency alone.
    """
    if options.bandwidth is None:
        if options.latency is not None:
            raise BadConfig("a latency alone predicts no time", hint="give the bandwidth, too: 900GB/s,50GB/s")
        return None
    return Topology.make(devices, options.nodes, options.bandwidth, latency=parse_latency(options.latency))


def _with_copies(options: PlaceOptions, trace: Any, placement: Placement, groups: int) -> dict[str, Placement]:
    """By name; the one to be written last."""
    if not options.redundant:
        return {}
    counted = trace.require(["load"])
    load = {layer: counted[layer]["load"] for layer in placement.layers}
    added = add_copies(placement, load, options.redundant)
    by_load = place_by_load(
        load,
        placement.devices,
        options.redundant,
        nodes=placement.nodes,
        routing_groups=groups,
        fingerprint=placement.fingerprint,
        trace=placement.trace,
    )
    found = {f"{options.method}+{options.redundant}": added, f"eplb+{options.redundant}": by_load}
    return found if options.copies == "eplb" else dict(reversed(found.items()))


def _predictions(
    options: PlaceOptions, measured: Any, placements: dict[str, Placement], topology: Topology
) -> list[dict[str, Any]]:
    itemsize = 4 if options.dtype == "float32" else 2
    return [
        {"placement": name, **predict_sending(measured, placement, topology, itemsize=itemsize).as_dict()}
        for name, placement in placements.items()
    ]


def _gain(options: PlaceOptions, devices: int, measured: Any, placement: Any, seed: int) -> dict[str, Any] | None:
    """What the constraint spares beyond placement alone, paired over documents."""
    if options.baseline is None or options.baseline_trace is None:
        return None
    free = Placement.load(Path(options.baseline) / placement_file(devices))
    plain = Trace.load(options.baseline_trace)
    gain = constraint_gain(plain, free, measured, placement, seed=seed)
    return {**asdict(gain), "trained_alike": trained_alike(plain.meta, measured.meta)}


def _routing_groups(options: PlaceOptions) -> int:
    if options.model is None:
        return 1
    return int(routing_groups(Checkpoint.open(model_location(options.model)).config))
