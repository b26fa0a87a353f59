"""`use: place`: decide which device holds which expert, and count by replay what is sent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moekit import catalogue
from moekit.errors import BadConfig
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ModelRef, PlacementRef, TraceRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import changed_bytes, model_item, model_location
from moekit.jobs.shared.trained import trained_alike
from moekit.recipe.steps.base import Step
from moekit.report.results import REPLAY, placement_file

if TYPE_CHECKING:
    from moekit.placement import Placement, Topology


class PlaceStep(Step):
    """Place experts on devices, layer by layer, for several numbers of devices, and replay a trace to count rows."""

    use: Literal["place"] = "place"
    trace: TraceRef = Field(description="trace that the placement is made for")
    method: str = Field(default="auto", description="solver; see moekit methods place; auto: exact where it can be")
    settings: dict[str, Any] = Field(default_factory=dict, description="the solver's own options")
    devices: tuple[int, ...] = Field(default=(2,), min_length=1, description="numbers of devices to place on")
    nodes: int = Field(default=1, ge=1, description="nodes that the devices stand in")
    replay: TraceRef | None = Field(
        default=None, description="trace to count rows on, of this model or of one tuned from it; the same by default"
    )
    other_weights: bool = Field(
        default=False, description="replay although the trace is of a model that is not known to be made from this one"
    )
    compare: tuple[str, ...] = Field(default=("contiguous", "random"), description="other solvers to count for, too")
    baseline: PlacementRef | None = Field(default=None, description="folder of another place step, of the free model")
    baseline_trace: TraceRef | None = Field(default=None, description="trace of the free model on the same documents")
    model: ModelRef | None = Field(default=None, description="write this model with its experts in device order")
    bandwidth: str | None = Field(
        default=None,
        description="of a link inside a node, then across nodes, such as 900GB/s,50GB/s: predict bytes and seconds",
    )
    latency: str | None = Field(
        default=None, description="before the first byte, inside a node, then across, such as 3us,10us"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="type of the hidden states that travel, for predicted bytes"
    )
    spare: int = Field(default=0, ge=0, description="expert slots of each device to fill with copies of hot experts")
    copies: Literal["added", "eplb"] = Field(
        default="added",
        description="added: keep the solver's owners; eplb: choose owners, too, by load alone. Both are counted, "
        "this one is written",
    )

    def check(self) -> None:
        """Refuse an unknown solver and impossible options."""
        for name in {self.method, *self.compare} - {"auto"}:
            catalogue.make("place", name, self.settings if name == self.method else {})
        for devices in self.devices:
            self._topology(devices)

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """Placements are small; a permuted model is as large as its parent."""
        others = [sizes.item(path) for path in (self.trace, self.replay, self.baseline, self.baseline_trace) if path]
        written: int | None = 1 << 16
        memory = sum(item.nbytes or 0 for item in others) or None
        if self.model is not None:
            model = model_item(self.model, sizes)
            others.append(model)
            each = changed_bytes(self.model, model)
            written = None if each is None else (1 << 16) + each * len(self.devices)
        return Forecast(tuple(others), (Item(str(out), written),), disk=written, memory=memory)

    def run(self, work: JobContext) -> dict[str, Any]:
        """Solve, replay, write `placement-D.json` for each D."""
        from moekit.checkpoint import atomic_folder
        from moekit.trace import Trace

        trace = Trace.load(self.trace)
        measured = trace
        if self.replay is not None:
            measured = Trace.load(self.replay)
            if not self.other_weights:
                measured.check_descent(trace)
            # The placement is for the model that is replayed; it is planned on a trace of what that was tuned from.
            trace.meta = trace.meta.model_copy(update={"fingerprint": measured.meta.fingerprint})
        results: dict[str, Any] = {"method": self.method, "routing": measured.meta.routing, "trace": measured.digest}
        results["devices"] = []
        with atomic_folder(work.out, overwrite=work.overwrite) as folder:
            for devices in self.devices:
                results["devices"].append(self._on(devices, trace, measured, folder, work))
            (folder / REPLAY).write_text(json.dumps(results, indent=1) + "\n")
        return results

    def _on(self, devices: int, trace: Any, measured: Any, folder: Path, work: JobContext) -> dict[str, Any]:
        from moekit.placement.apply import place_checkpoint
        from moekit.placement.comparison import compare, compare_solvers
        from moekit.placement.simulation import place_trace

        options: dict[str, Any] = {"nodes": self.nodes, "routing_groups": self._routing_groups(), "seed": work.seed}
        placement = place_trace(
            trace, devices, solver=self.method, config=self.settings, progress=work.progress, **options
        )
        placements = {self.method: placement, **self._with_copies(trace, placement, options["routing_groups"])}
        # The one that is written comes last: later steps read it there.
        *_, placement = placements.values()
        placement.save(folder / placement_file(devices))
        rows = compare(measured, placements).as_dicts()
        if self.compare:
            planned = {name: options[name] for name in ("nodes", "routing_groups")}
            others = compare_solvers(
                measured, (devices,), self.compare, planned_on=trace, seed=work.seed, options=planned
            )
            rows = [*others.as_dicts(), *rows]
        if self.model is not None:
            target = folder / f"model-{devices}"
            location = model_location(self.model, work.progress)
            place_checkpoint(location, placement, target, command=work.command, progress=work.progress)
        topology = self._topology(devices)
        if topology is not None:
            others_placed = {name: place_trace(trace, devices, solver=name, **options) for name in self.compare}
            placements = {**others_placed, **placements}
        return {
            "devices": devices,
            "placement": placement.hash,
            "solver": placement.solver,
            "spare": self.spare,
            "proven_layers": len(placement.proven),
            "layers": len(placement.layers),
            "rows": rows,
            "gain": self._gain(devices, measured, placement, work.seed),
            "links": None if topology is None else {**topology.model_dump(), "dtype": self.dtype},
            "predictions": [] if topology is None else self._predictions(measured, placements, topology),
        }

    def _topology(self, devices: int) -> Topology | None:
        """Links to predict for; None where no bandwidth is given.

        Raises:
            BadConfig: an unreadable bandwidth or latency, more nodes than devices, or a latency alone.
        """
        from moekit.placement.topology import Topology, parse_latency

        if self.bandwidth is None:
            if self.latency is not None:
                raise BadConfig("a latency alone predicts no time", hint="give the bandwidth, too: 900GB/s,50GB/s")
            return None
        return Topology.make(devices, self.nodes, self.bandwidth, latency=parse_latency(self.latency))

    def _with_copies(self, trace: Any, placement: Placement, groups: int) -> dict[str, Placement]:
        """By name; the one to be written last."""
        if not self.spare:
            return {}
        from moekit.placement.spare import add_copies, place_by_load

        counted = trace.require(["load"])
        load = {layer: counted[layer]["load"] for layer in placement.layers}
        added = add_copies(placement, load, self.spare)
        by_load = place_by_load(
            load,
            placement.devices,
            self.spare,
            nodes=placement.nodes,
            routing_groups=groups,
            fingerprint=placement.fingerprint,
            trace=placement.trace,
        )
        found = {f"{self.method}+{self.spare}": added, f"eplb+{self.spare}": by_load}
        return found if self.copies == "eplb" else dict(reversed(found.items()))

    def _predictions(self, measured: Any, placements: dict[str, Placement], topology: Topology) -> list[dict[str, Any]]:
        from moekit.placement.sending import predict_sending

        itemsize = 4 if self.dtype == "float32" else 2
        return [
            {"placement": name, **predict_sending(measured, placement, topology, itemsize=itemsize).as_dict()}
            for name, placement in placements.items()
        ]

    def _gain(self, devices: int, measured: Any, placement: Any, seed: int) -> dict[str, Any] | None:
        """What the constraint spares beyond placement alone, paired over documents."""
        if self.baseline is None or self.baseline_trace is None:
            return None
        from moekit.placement import Placement, constraint_gain
        from moekit.trace import Trace

        free = Placement.load(Path(self.baseline) / placement_file(devices))
        plain = Trace.load(self.baseline_trace)
        gain = constraint_gain(plain, free, measured, placement, seed=seed)
        return {**asdict(gain), "trained_alike": trained_alike(plain.meta, measured.meta)}

    def _routing_groups(self) -> int:
        if self.model is None:
            return 1
        from moekit.checkpoint import Checkpoint
        from moekit.placement import routing_groups

        return int(routing_groups(Checkpoint.open(model_location(self.model)).config))
