"""What `moekit prune` and `moekit merge` do: decide what stays of each layer, prove what that costs, and write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from moekit import catalogue
from moekit._device import resolve_device
from moekit.errors import BadConfig
from moekit.jobs.call import JobResult
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.fewer import FewerOptions
from moekit.jobs.shared.inputs import lies_here, model_item, text_item
from moekit.jobs.shared.opened import check_runnable
from moekit.jobs.shared.outputs import model_or_plan
from moekit.jobs.weights.fewer_decide import decide
from moekit.jobs.weights.fewer_finish import finish, log_warnings, summary_of_plan
from moekit.jobs.weights.fewer_request import ask, proves
from moekit.jobs.weights.plans import PLAN_BYTES, plan_beside, save_plan
from moekit.jobs.weights.protection import SUPER
from moekit.jobs.weights.sizes import budget_of, check_disk, refuse_uneven, warn_uneven
from moekit.jobs.weights.texts import read_texts, refuse_unread

Options = TypeVar("Options", bound=FewerOptions)


class FewerResult(JobResult):
    """What was decided, and what that costs.

    Attributes:
        method: what decided.
        settings: its knobs.
        repair: how experts that stay were refitted; None where they were not.
        budget: what was to stay.
        top_k: choices a token makes; None as before.
        groups: what became of routing groups.
        model: what was pruned.
        plan: hash of the plan.
        tokens: that were decided on.
        domains: of the text.
        experts: before and after, over all layers.
        bytes: before and after.
        layers: each with experts, those kept, never routed and protected, and the method's figures.
        warnings: what a reader must know of the data.
        proof: held-out text and blocks' errors, against baselines; None where nothing was proved.
        check: what the check of the written folder found; None where only a plan was written.
    """

    method: str
    settings: dict[str, Any]
    repair: dict[str, Any] | None
    budget: dict[str, Any]
    top_k: int | None
    groups: str
    model: str
    plan: str
    tokens: int
    domains: list[str]
    experts: dict[str, int]
    bytes: dict[str, int]
    layers: list[dict[str, Any]]
    warnings: list[str]
    proof: dict[str, Any] | None = None
    check: dict[str, Any] | None = None


def settle(options: Options, out: Path | None, overwrite: bool) -> tuple[Options, Path, bool]:
    """Without `out` the plan alone is written."""
    return model_or_plan(options, out, overwrite)


def check(options: FewerOptions) -> None:
    """Refuse an unknown method, impossible knobs and budgets, and a run without what it needs."""
    budget = budget_of(options.keep, options.scope, options.least, options.most)  # first: it is known at once
    resolve_device(options.device)
    method = catalogue.make(options.kind, options.method, options.settings)
    refuse_uneven(budget, options.stock_only)
    if budget.scope == "global" and method.searches:
        raise BadConfig(f"{options.method} needs to know how many experts each layer keeps", hint="--scope uniform")
    if options.data is not None and options.trace is not None:
        raise BadConfig("data and trace are both given", hint="decide on one of them; --heldout is for the proof")
    on_text = method.passes in ("search", "sequential")
    if options.trace is not None and on_text:
        raise BadConfig(f"{options.method} runs layers on text, which a trace does not hold", hint="give --data")
    if options.data is None and options.trace is None and (on_text or method.required):
        what = "runs layers on text" if on_text else f"decides from {', '.join(method.required)}"
        way = "give text (--data)" if on_text else "give text (--data) or a trace (--trace) of this model"
        raise BadConfig(f"{options.method} {what}", hint=way)
    _check_repair(options, method.redirects)
    refuse_unread(options)
    if options.self_generated is None and options.given("demonstrations"):
        raise BadConfig("demonstrations is given, but no prompts are answered", hint="say --self-generated TOKENS, too")
    if options.self_generated is not None and options.data is None:
        raise BadConfig("there are no prompts to answer", hint="give prompts (--data), or leave --self-generated out")
    if options.protect == SUPER and options.data is None and options.trace is None:
        raise BadConfig("super experts are found on text", hint="give text (--data) or a trace that holds them")
    if proves(options) and options.data is None and options.heldout is None:
        raise BadConfig(
            "there is no text to prove the result on", hint="give --heldout TEXT, or say --no-proof to go without"
        )


def _check_repair(options: FewerOptions, redirects: bool) -> None:
    if options.repair == "none":
        if options.ridge is not None:
            raise BadConfig("ridge is given, but nothing is repaired", hint="say --repair least-squares, too")
        return
    if redirects:
        raise BadConfig(
            f"{options.method} sends tokens of experts that are gone elsewhere, which a repair does not follow",
            hint="leave --repair out, or take another method (moekit methods prune)",
        )
    if options.data is None:
        raise BadConfig("the repair is measured on text", hint="give text (--data), or leave --repair out")


def estimate(options: FewerOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Exact where the model lies here; the bytes of a model that is not here yet are those of its parent."""
    model = model_item(options.model, sizes)
    reads = [model, *(text_item(text, sizes) for text in (options.data, options.heldout) if text)]
    reads += [sizes.item(options.trace)] if options.trace else []
    notes = [] if options.self_generated is None else ["the whole model is loaded to answer the prompts"]
    notes += ["layers are read from disk one at a time: memory does not grow with their number"]
    if options.scope == "global":
        notes.append("layers may keep different numbers of experts: the result loads through moekit.load only")
    plan_only = options.write == "plan"
    if not lies_here(options.model):
        nbytes = PLAN_BYTES if plan_only else model.nbytes
        return JobEstimate(tuple(reads), (Item(str(out), nbytes),), disk=nbytes, notes=tuple(notes))
    asked = ask(options, 0)
    written = PLAN_BYTES if plan_only else asked.written
    whole = 0 if options.self_generated is None else asked.source.nbytes + (1 << 30)
    return JobEstimate(
        tuple(reads),
        (Item(str(out), written),),
        disk=written + asked.between,
        memory=max(asked.memory, whole),
        notes=tuple(notes),
    )


def run(options: FewerOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what is impossible, calibrate, decide, prove, write, check."""
    check(options)
    seed, progress, scratch, out = context.seed, context.progress, context.scratch, context.out
    asked = ask(options, seed, progress)
    warn_uneven(asked.request.keep_budget)
    if proves(options):
        check_runnable(asked.source)
    writes_plan = options.write == "plan"
    check_disk(out, scratch, PLAN_BYTES if writes_plan else asked.written, asked.between)
    documents, heldout = read_texts(
        options, asked.source, progress, apart=options.heldout is None, proves=proves(options)
    )
    decided = decide(options, asked, documents, scratch, progress)
    warnings = log_warnings(decided.plan)
    if not writes_plan:
        with plan_beside(decided.plan, options.plan, overwrite=context.overwrite):
            return finish(decided, heldout, options, context, warnings)
    save_plan(decided.plan, out, overwrite=context.overwrite)
    return summary_of_plan(decided, warnings, asked.size.tensors)
