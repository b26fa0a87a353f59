"""`use: route`: plan a routing policy from a trace, and write it as a plan or as a model that routes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moekit import catalogue
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ModelRef, PlacementRef, TraceRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import changed_bytes, model_item, open_model, save_changed
from moekit.recipe.steps.base import Step


class RouteStep(Step):
    """Let a routing policy (`moekit methods routing`) plan every layer."""

    use: Literal["route"] = "route"
    model: ModelRef = Field(description="MoE: folder or hub id")
    method: str = Field(description="policy; see moekit methods routing")
    settings: dict[str, Any] = Field(default_factory=dict, description="the policy's own options")
    trace: TraceRef | None = Field(default=None, description="trace of this model, for policies that need statistics")
    placement: PlacementRef | None = Field(default=None, description="placement file, for policies that need devices")
    write: Literal["plan", "model"] = Field(default="plan", description="write the plan alone, or a model with it")

    drop_unknown: bool = Field(
        default=False,
        description="leave out what the source holds beyond the model, with write: model",
    )

    def check(self) -> None:
        """Refuse an unknown method and impossible options."""
        catalogue.make("routing", self.method, self.settings)

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """A plan is small; a model is as large as its parent."""
        model = model_item(self.model, sizes)
        others = [sizes.item(path) for path in (self.trace, self.placement) if path is not None]
        written = changed_bytes(self.model, model) if self.write == "model" else 1 << 20
        return Forecast((model, *others), (Item(str(out), written),), disk=written, memory=model.nbytes)

    def run(self, work: JobContext) -> dict[str, Any]:
        """Plan and write."""
        from moekit import catalogue
        from moekit.anatomy import find_moe_layers
        from moekit.checkpoint import fingerprint_model
        from moekit.placement import Placement
        from moekit.routing import plan_routing
        from moekit.trace import Trace

        record = catalogue.get("routing", self.method)
        policy = catalogue.make("routing", self.method, self.settings)
        model, tokenizer = open_model(self.model, progress=work.progress)
        fingerprint = fingerprint_model(model)
        statistics = trace_hash = None
        if self.trace is not None:
            trace = Trace.load(self.trace)
            trace.check_model(fingerprint)
            statistics, trace_hash = trace.require(record.needs), trace.digest
        placed = None if self.placement is None else Placement.load(self.placement)
        if placed is not None:
            placed.check_model(fingerprint)
        plan = plan_routing(
            find_moe_layers(model),
            policy,
            self.method,
            statistics,
            devices=None if placed is None else placed.layers,
            fingerprint=fingerprint,
            trace=trace_hash or "",
            progress=work.progress,
        )
        if self.write == "plan":
            plan.save(work.out, overwrite=work.overwrite)
        else:
            plan.apply(model, fingerprint=fingerprint)
            save_changed(
                model,
                tokenizer,
                work,
                parent=self.model,
                config=self.settings,
                plan_hash=plan.hash,
                drop_unknown=self.drop_unknown,
            )
        return {
            "method": self.method,
            "settings": plan.header.config,
            "plan": plan.hash,
            "layers": len(plan.header.layers),
        }
