"""`use: apply`: carry a pruning plan out, with its own budget or another one, without a new pass over the text."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Literal

from moekit._device import DtypeName, resolve_device
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.plan import WeightPlan, budget_as
from moekit.compress.engine.planning import redecide
from moekit.compress.engine.request import PlanRequest
from moekit.data.encoding import Bos
from moekit.errors import BadConfig, MoekitError
from moekit.jobs.call import TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.apply import ApplyOptions
from moekit.jobs.shared.inputs import lies_here, model_item, record_bytes, text_item
from moekit.jobs.shared.opened import OpenedModel, check_runnable, open_source
from moekit.jobs.weights.fewer_finish import Decided, finish, in_groups, log_warnings
from moekit.jobs.weights.fewer_job import FewerResult
from moekit.jobs.weights.mtp import check_mtp
from moekit.jobs.weights.plans import plan_path
from moekit.jobs.weights.sizes import (
    budget_of,
    bytes_between,
    check_disk,
    memory_of,
    refuse_uneven,
    rewritten_bytes,
    size_of_result,
    warn_uneven,
)
from moekit.jobs.weights.texts import heldout_of_plan
from moekit.progress import ProgressLike

logger = logging.getLogger(__name__)


def apply(
    plan: str | Path,
    *,
    model: str | Path | None = None,
    heldout: TextLike | None = None,
    keep: int | float | str | None = None,
    scope: Literal["uniform", "global"] | None = None,
    least: int | None = None,
    most: int | None = None,
    other_weights: bool = False,
    proof: bool = True,
    proof_tokens: int | None = 32768,
    window: int | None = None,
    random_seeds: int = 1,
    stock_only: bool = False,
    mtp: Literal["drop", "keep", "prune"] = "drop",
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> FewerResult:
    """Write the model that a pruning plan describes, or decide anew from the plan's scores with another budget.

    Args:
        plan: plan file, or the folder of a prune step that wrote one.
        model: MoE: folder or hub id; the plan's own by default.
        heldout: text to prove the result on; by default what was kept apart when the plan was made.
        keep: what stays instead: experts a layer, their fraction, or bytes; see moekit prune.
        scope: equally many in each layer, or wherever they are worth most; the plan's by default.
        least: fewest a layer keeps, with scope global.
        most: most a layer keeps, with scope global.
        other_weights: accept a model of the same shape and other weights, such as a quantized copy.
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
        out: folder of the smaller model.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit apply` prints.

    Raises:
        BadConfig: an impossible option, a budget that the model cannot have, or nothing to decide or prove on.
        BadData: no text.
        BadCheckpoint: the model is damaged, or what was written is not what it must be; then nothing is left.
        OutOfBudget: the disk is too small.
    """
    return call(ApplyOptions, FewerResult, dict(locals()))


def further_inputs(options: ApplyOptions) -> list[tuple[str, str]]:
    """The plan's own model, too, where no other is given."""
    if options.model is None and plan_path(options.plan).is_file():
        with contextlib.suppress(MoekitError):  # told where the plan is read
            return [("model", _load(options).file.model)]
    return []


def settle(options: ApplyOptions, out: Path | None, overwrite: bool) -> tuple[ApplyOptions, Path, bool]:
    """Refuse to begin without a place to write.

    Raises:
        BadConfig: there is none.
    """
    if out is None:
        raise BadConfig("nothing says where to write", hint="-o OUT, the folder of the smaller model")
    return options, out, overwrite


def check(options: ApplyOptions) -> None:
    """Refuse an impossible budget."""
    resolve_device(options.device)
    if options.keep is None and (options.scope or options.least or options.most):
        raise BadConfig("scope, least and most are about another budget", hint="give --keep as well")
    if options.keep is not None:
        budget_of(options.keep, options.scope or "global", options.least, options.most)


def estimate(options: ApplyOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Exact where plan and model lie here."""
    reads = [sizes.item(options.plan), *(text_item(text, sizes) for text in (options.heldout,) if text)]
    if not plan_path(options.plan).is_file():
        return JobEstimate(tuple(reads), (Item(str(out), None),))
    plan = _load(options)
    reference = options.model or plan.file.model
    model = model_item(reference, sizes)
    if model.nbytes is None or not lies_here(reference):
        return JobEstimate((*reads, model), (Item(str(out), model.nbytes),), disk=model.nbytes)
    source = open_source(reference)
    plan = _fitting(options, plan, source)
    request = _request(options, plan)
    refuse_uneven(request.keep_budget, options.stock_only)
    check_mtp(source.checkpoint, options.mtp, request, plan.file.mtp)
    nbytes, between = _bytes(options, plan, source, request)
    return JobEstimate(
        (*reads, model), (Item(str(out), nbytes),), disk=nbytes + between, memory=memory_of(source, options)
    )


def run(options: ApplyOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what is impossible, decide anew if asked, prove, write, check."""
    check(options)
    plan = _load(options)
    source = open_source(options.model or plan.file.model, context.progress)
    plan = _fitting(options, plan, source)
    request = _request(options, plan)
    refuse_uneven(request.keep_budget, options.stock_only)
    check_mtp(source.checkpoint, options.mtp, request, plan.file.mtp)
    warn_uneven(request.keep_budget)
    written, between = _bytes(options, plan, source, request)
    if options.proof:
        check_runnable(source)
    check_disk(context.out, context.scratch, written, between)
    heldout = heldout_of_plan(plan, options, source, context.progress) if options.proof else None
    decided = Decided(source, request, _decided(options, plan, source, request), plan.statistics)
    return finish(decided, heldout, options, context, log_warnings(decided.plan))


def _load(options: ApplyOptions) -> WeightPlan:
    plan = WeightPlan.load(plan_path(options.plan), "prune", "merge")
    if plan.made_on_text:
        plan.made_layers()  # refuses: a file holds no weights
    return plan


def _fitting(options: ApplyOptions, plan: WeightPlan, source: OpenedModel) -> WeightPlan:
    """The plan as one of this model.

    Raises:
        BadConfig: it was made for another one.
    """
    if not options.other_weights:
        plan.check_model(source.checkpoint.fingerprint, source.checkpoint.path)
        return plan
    told = {layer: (p.experts, p.hidden, p.width) for layer, p in plan.file.layers.items()}
    here = {layer: (g.experts, g.hidden, g.width) for layer, g in source.geometries.items()}
    if told != here:
        raise BadConfig(
            f"this plan was made for {plan.file.model}, a model of another shape",
            file=source.checkpoint.path,
            hint="make a plan for this model: scores of one say nothing of another",
        )
    update = {"fingerprint": source.checkpoint.fingerprint}
    return WeightPlan(plan.file.model_copy(update=update), plan.statistics)


def _budget(options: ApplyOptions, plan: WeightPlan) -> Budget:
    if options.keep is None:
        return budget_as(Budget, plan.file.budget)
    before = budget_as(Budget, plan.file.budget)
    scope = options.scope or before.scope
    if scope == "uniform":
        return budget_of(options.keep, scope, options.least, options.most)
    return budget_of(options.keep, scope, options.least or before.least, options.most or before.most)


def _request(options: ApplyOptions, plan: WeightPlan) -> PlanRequest:
    file = plan.file
    budget = _budget(options, plan)
    return PlanRequest(plan.method, budget, file.top_k, file.groups, file.seed, file.protected, file.repair)


def _decided(options: ApplyOptions, plan: WeightPlan, source: OpenedModel, request: PlanRequest) -> WeightPlan:
    if options.keep is None:
        return plan
    made = redecide(plan, source.checkpoint, request.keep_budget)
    return WeightPlan(made.file.model_copy(update={"layers": in_groups(source, made)}), made.statistics)


def _bytes(options: ApplyOptions, plan: WeightPlan, source: OpenedModel, request: PlanRequest) -> tuple[int, int]:
    """Bytes of the folder with its records, and of work in between; refuses what this model cannot have."""
    size = size_of_result(source, request, plan.file.method, stock_only=options.stock_only, mtp=options.mtp)
    proof = (options.proof_tokens or (1 << 20)) if options.proof else 0
    rewritten, variants = rewritten_bytes(source, size, request), 2 + options.random_seeds
    between = bytes_between(source, options, proof_tokens=proof, variants=variants, rewritten=rewritten)
    return size.nbytes + record_bytes(source.checkpoint.tensors.values()), between
