"""`use: place`: decide which device holds which expert, and count by replay what is sent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moekit.recipe.inputs import model_item, model_location
from moekit.recipe.methods import make
from moekit.recipe.plan import Forecast, Item, Sizes
from moekit.recipe.results import REPLAY, placement_file
from moekit.recipe.steps.base import ModelRef, PlacementRef, Step, TraceRef, Workplace


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
    compare: tuple[str, ...] = Field(default=("contiguous", "random"), description="other solvers to count for, too")
    baseline: PlacementRef | None = Field(default=None, description="folder of another place step, of the free model")
    baseline_trace: TraceRef | None = Field(default=None, description="trace of the free model on the same documents")
    model: ModelRef | None = Field(default=None, description="write this model with its experts in device order")

    def check(self) -> None:
        """Refuse an unknown solver and impossible options."""
        for name in {self.method, *self.compare} - {"auto"}:
            make("place", name, self.settings if name == self.method else {})

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """Placements are small; a permuted model is as large as its parent."""
        others = [sizes.item(path) for path in (self.trace, self.replay, self.baseline, self.baseline_trace) if path]
        written: int | None = 1 << 16
        memory = sum(item.nbytes or 0 for item in others) or None
        if self.model is not None:
            model = model_item(self.model, sizes)
            others.append(model)
            written = None if model.nbytes is None else model.nbytes * len(self.devices)
        return Forecast(tuple(others), (Item(str(out), written),), disk=written, memory=memory)

    def run(self, work: Workplace) -> dict[str, Any]:
        """Solve, replay, write `placement-D.json` for each D."""
        from moekit.checkpoint import atomic_folder
        from moekit.trace import Trace

        trace = Trace.load(self.trace)
        measured = trace
        if self.replay is not None:
            measured = Trace.load(self.replay)
            # The placement is for the model that is replayed; it is planned on a trace of what that was tuned from.
            trace.meta = trace.meta.model_copy(update={"fingerprint": measured.meta.fingerprint})
        results: dict[str, Any] = {"method": self.method, "routing": measured.meta.routing, "trace": measured.digest}
        results["devices"] = []
        with atomic_folder(work.out, overwrite=work.overwrite) as folder:
            for devices in self.devices:
                results["devices"].append(self._on(devices, trace, measured, folder, work))
            (folder / REPLAY).write_text(json.dumps(results, indent=1) + "\n")
        return results

    def _on(self, devices: int, trace: Any, measured: Any, folder: Path, work: Workplace) -> dict[str, Any]:
        from moekit.placement.apply import place_checkpoint
        from moekit.placement.comparison import compare, compare_solvers
        from moekit.placement.simulation import place_trace

        groups = self._routing_groups()
        placement = place_trace(
            trace,
            devices,
            solver=self.method,
            config=self.settings,
            nodes=self.nodes,
            routing_groups=groups,
            seed=work.seed,
            progress=work.progress,
        )
        placement.save(folder / placement_file(devices))
        rows = compare(measured, {self.method: placement}).as_dicts()
        if self.compare:
            options = {"nodes": self.nodes, "routing_groups": groups}
            others = compare_solvers(
                measured, (devices,), self.compare, planned_on=trace, seed=work.seed, options=options
            )
            rows = [*others.as_dicts(), *rows]
        if self.model is not None:
            target = folder / f"model-{devices}"
            location = model_location(self.model, work.progress)
            place_checkpoint(location, placement, target, command=work.command, progress=work.progress)
        return {
            "devices": devices,
            "placement": placement.hash,
            "solver": placement.solver,
            "proven_layers": len(placement.proven),
            "layers": len(placement.layers),
            "rows": rows,
            "gain": self._gain(devices, measured, placement, work.seed),
        }

    def _gain(self, devices: int, measured: Any, placement: Any, seed: int) -> dict[str, Any] | None:
        """What the constraint spares beyond placement alone, paired over documents."""
        if self.baseline is None or self.baseline_trace is None:
            return None
        from moekit.placement import Placement, constraint_gain
        from moekit.trace import Trace

        free = Placement.load(Path(self.baseline) / placement_file(devices))
        gain = constraint_gain(Trace.load(self.baseline_trace), free, measured, placement, seed=seed)
        return asdict(gain)

    def _routing_groups(self) -> int:
        if self.model is None:
            return 1
        from moekit.checkpoint import Checkpoint
        from moekit.placement import routing_groups

        return int(routing_groups(Checkpoint.open(model_location(self.model)).config))
