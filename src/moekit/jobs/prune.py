"""`use: prune`: decide which experts go, prove what that costs, and write the model without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moekit import catalogue
from moekit._device import DtypeName, resolve_device
from moekit.data.encoding import Bos
from moekit.errors import BadConfig
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.prune import PruneOptions
from moekit.jobs.shared.inputs import lies_here, model_item, text_item
from moekit.jobs.shared.opened import check_runnable
from moekit.jobs.shared.outputs import model_or_plan
from moekit.jobs.weights.plans import PLAN_BYTES, plan_beside, save_plan
from moekit.jobs.weights.protection import SUPER
from moekit.jobs.weights.prune_decide import decide
from moekit.jobs.weights.prune_finish import finish, log_warnings, summary_of_plan
from moekit.jobs.weights.prune_request import ask, proves
from moekit.jobs.weights.sizes import budget_of, check_disk, refuse_uneven, warn_uneven
from moekit.jobs.weights.texts import read_texts, refuse_unread
from moekit.progress import ProgressLike


class PruneResult(JobResult):
    """What pruning decided, and what that costs.

    Attributes:
        method: what decided.
        settings: its knobs.
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


def prune(
    model: str | Path,
    *,
    method: str,
    settings: Mapping[str, Any] | None = None,
    keep: int | float | str,
    data: TextLike | None = None,
    trace: str | Path | None = None,
    heldout: TextLike | None = None,
    scope: Literal["uniform", "global"] = "uniform",
    least: int | None = None,
    most: int | None = None,
    top_k: int | None = None,
    groups: Literal["free", "equal"] = "free",
    protect: str | Path | None = None,
    self_generated: int | None = None,
    demonstrations: int = 25,
    max_tokens: int | None = 65536,
    seq_len: int = 512,
    batch_size: int = 8,
    plan: str | Path | None = None,
    write: Literal["model", "plan"] = "model",
    proof: bool = True,
    proof_tokens: int | None = 32768,
    window: int | None = None,
    random_seeds: int = 1,
    stock_only: bool = False,
    mtp: Literal["drop", "keep", "prune"] = "drop",
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> PruneResult:
    """Let a pruning method (`moekit methods prune`) decide, prove what that costs, and write the smaller model.

    Args:
        model: MoE: folder or hub id.
        method: which experts go; see moekit methods prune.
        settings: the method's own knobs.
        keep: what stays: experts a layer (64), their fraction (0.5; 1.0 is all), or bytes of the model (12GiB)
        data: text to decide on: file, folder, source, mix or hub id.
        trace: trace of this model to decide on, instead of data.
        heldout: text to prove the result on; by default a tenth of data, which is kept apart for it.
        scope: equally many in each layer, or wherever they are worth most (moekit.load only)
        least: fewest a layer keeps, with scope global.
        most: most a layer keeps, with scope global.
        top_k: choices a token makes from now on; as before by default.
        groups: routing groups: lift the router's limits to them, or keep equally many of each.
        protect: experts that stay: super, layer:expert pairs such as 1:68,2:92, or a JSON file.
        self_generated: take data as prompts: decide on each with the model's own answer of up to so many tokens behind
            it (the whole model runs, not layer by layer)
        demonstrations: prompts of each domain that are answered.
        max_tokens: tokens of data, at most, shared by its domains; answered prompts count apart.
        seq_len: tokens a row, the model's limit if that is less; a prompt and its answer are one.
        batch_size: rows a pass.
        plan: also write scores and outcome to this file.
        write: write the smaller model, or the plan alone.
        proof: measure what it costs, against frequency and random pruning.
        proof_tokens: held-out tokens, at most, an equal share of each domain.
        window: longest context of the proof in tokens (default: the model's, ≤ 1024)
        random_seeds: random choices that the proof compares with.
        stock_only: refuse what stock transformers does not load.
        mtp: multi-token-prediction layers: leave them out, copy them, or cut them to as many experts, those that their
            own router gives the most weight on the text, behind the decoder as it was.
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: where layers run: cpu, cuda, ...
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        out: folder of the smaller model; None writes the plan alone.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit prune` prints.

    Raises:
        BadConfig: an impossible option, a budget that the model cannot have, or nothing to decide or prove on.
        BadData: no text.
        BadCheckpoint: the model is damaged, or what was written is not what it must be; then nothing is left.
        OutOfBudget: the disk is too small.
    """
    return call(PruneOptions, PruneResult, dict(locals()))


def settle(options: PruneOptions, out: Path | None, overwrite: bool) -> tuple[PruneOptions, Path, bool]:
    """Without `out` the plan alone is written."""
    return model_or_plan(options, out, overwrite)


def check(options: PruneOptions) -> None:
    """Refuse an unknown method, impossible knobs and budgets, and a run without what it needs."""
    budget = budget_of(options.keep, options.scope, options.least, options.most)  # first: it is known at once
    resolve_device(options.device)
    method = catalogue.make("prune", options.method, options.settings)
    refuse_uneven(budget, options.stock_only)
    if budget.scope == "global" and method.searches:
        raise BadConfig(f"{options.method} needs to know how many experts each layer keeps", hint="--scope uniform")
    if options.data is not None and options.trace is not None:
        raise BadConfig("data and trace are both given", hint="decide on one of them; --heldout is for the proof")
    if options.trace is not None and method.searches:
        raise BadConfig(f"{options.method} runs layers on text, which a trace does not hold", hint="give --data")
    if options.data is None and options.trace is None and (method.searches or method.required):
        what = "runs layers on text" if method.searches else f"decides from {', '.join(method.required)}"
        raise BadConfig(f"{options.method} {what}", hint="give text (--data) or a trace (--trace) of this model")
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


def estimate(options: PruneOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
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


def run(options: PruneOptions, context: JobContext) -> dict[str, Any]:
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
