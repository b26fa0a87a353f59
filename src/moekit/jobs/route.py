"""`use: route`: plan a routing policy from a trace, and write it as a plan or as a model that routes by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.checkpoint import fingerprint_model
from moekit.jobs.call import JobResult, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.route import RouteOptions
from moekit.jobs.shared.inputs import changed_bytes, model_item, open_model, save_changed
from moekit.placement import Placement
from moekit.progress import ProgressLike
from moekit.routing import plan_routing
from moekit.trace import Trace


class RouteResult(JobResult):
    """What a routing policy planned.

    Attributes:
        method: the policy.
        settings: its options.
        plan: hash of the plan.
        layers: that it routes.
    """

    method: str
    settings: dict[str, Any]
    plan: str
    layers: int


def route(
    model: str | Path,
    *,
    method: str,
    settings: Mapping[str, Any] | None = None,
    trace: str | Path | None = None,
    placement: str | Path | None = None,
    write: Literal["plan", "model"] = "plan",
    drop_unknown: bool = False,
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> RouteResult:
    """Let a routing policy (`moekit methods routing`) plan every layer.

    Args:
        model: MoE: folder or hub id.
        method: policy; see moekit methods routing.
        settings: the policy's own options.
        trace: trace of this model, for policies that need statistics.
        placement: placement file, for policies that need devices.
        write: write the plan alone, or a model with it.
        drop_unknown: leave out what the source holds beyond the model, with write: model.
        out: folder of the plan, or with --write model of the checkpoint.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit route` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(RouteOptions, RouteResult, dict(locals()))


def check(options: RouteOptions) -> None:
    """Refuse an unknown method and impossible options."""
    catalogue.make("routing", options.method, options.settings)


def estimate(options: RouteOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """A plan is small; a model is as large as its parent."""
    model = model_item(options.model, sizes)
    others = [sizes.item(path) for path in (options.trace, options.placement) if path is not None]
    written = changed_bytes(options.model, model) if options.write == "model" else 1 << 20
    return JobEstimate((model, *others), (Item(str(out), written),), disk=written, memory=model.nbytes)


def run(options: RouteOptions, context: JobContext) -> dict[str, Any]:
    """Plan and write."""
    record = catalogue.get("routing", options.method)
    policy = catalogue.make("routing", options.method, options.settings)
    model, tokenizer = open_model(options.model, progress=context.progress)
    fingerprint = fingerprint_model(model)
    statistics = trace_hash = None
    if options.trace is not None:
        trace = Trace.load(options.trace)
        trace.check_model(fingerprint)
        statistics, trace_hash = trace.require(record.needs), trace.digest
    placed = None if options.placement is None else Placement.load(options.placement)
    if placed is not None:
        placed.check_model(fingerprint)
    plan = plan_routing(
        find_moe_layers(model),
        policy,
        options.method,
        statistics,
        devices=None if placed is None else placed.layers,
        fingerprint=fingerprint,
        trace=trace_hash or "",
        progress=context.progress,
    )
    if options.write == "plan":
        plan.save(context.out, overwrite=context.overwrite)
    else:
        plan.apply(model, fingerprint=fingerprint)
        save_changed(
            model,
            tokenizer,
            context,
            parent=options.model,
            config=options.settings,
            plan_hash=plan.hash,
            drop_unknown=options.drop_unknown,
        )
    return {
        "method": options.method,
        "settings": plan.header.config,
        "plan": plan.hash,
        "layers": len(plan.header.layers),
    }
