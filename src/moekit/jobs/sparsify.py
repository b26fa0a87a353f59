"""`use: sparsify`: zero single weights of the experts, prove what that costs, and write the sparse model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moekit._device import DtypeName, named_dtype, resolve_device
from moekit.compress.engine.zeroing import check_sparsity
from moekit.data.encoding import Bos
from moekit.errors import BadConfig
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, JobEstimate
from moekit.jobs.options.sparsify import SparsifyOptions
from moekit.jobs.shared.outputs import model_or_plan
from moekit.jobs.weights.inplace_decide import decide
from moekit.jobs.weights.inplace_finish import Placed, finish, log_warnings
from moekit.jobs.weights.inplace_job import estimate_of
from moekit.jobs.weights.inplace_request import ask, check_decided, check_texts, inputs_of_plan
from moekit.jobs.weights.plans import plan_beside, save_plan
from moekit.jobs.weights.sizes import check_disk
from moekit.jobs.weights.sparsify_request import method_of, request_of
from moekit.jobs.weights.sparsify_summary import summary_of
from moekit.progress import ProgressLike


class SparsifyResult(JobResult):
    """The zeros counted, and what they cost.

    Attributes:
        method: what decided.
        settings: its knobs.
        sparsity: share of zeros among the routed experts' weights.
        total: share asked for of the original's weights.
        model: what was made sparse.
        plan: hash of the plan.
        tokens: that were decided on.
        weights: weights of the original, present, zeros, and shares.
        layers: each with zeros asked for and counted, and the method's figures.
        warnings: what a reader must know of the data.
        proof: held-out text and blocks' errors, against magnitudes; None where nothing was proved.
        check: what the check of the written folder found; None where only a plan was written.
    """

    method: str
    settings: dict[str, Any]
    sparsity: float
    total: float | None
    model: str
    plan: str
    tokens: int
    weights: dict[str, Any]
    layers: list[dict[str, Any]]
    warnings: list[str]
    proof: dict[str, Any] | None = None
    check: dict[str, Any] | None = None


def sparsify(
    model: str | Path | None = None,
    *,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    sparsity: float | None = None,
    total: float | None = None,
    original: str | Path | None = None,
    data: TextLike | None = None,
    heldout: TextLike | None = None,
    max_tokens: int | None = 65536,
    seq_len: int = 512,
    batch_size: int = 8,
    plan: str | Path | None = None,
    from_plan: str | Path | None = None,
    write: Literal["model", "plan"] = "model",
    proof: bool = True,
    proof_tokens: int | None = 32768,
    window: int | None = None,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> SparsifyResult:
    """Zero the weights of the experts that matter least (`moekit methods sparsify`); routers and biases stay.

    Args:
        model: MoE: folder or hub id; a stored plan names its own.
        method: which weights go; see moekit methods sparsify.
        settings: the method's own knobs.
        sparsity: share of zeros among the routed experts' weights of this model.
        total: share that is to be gone, with whole experts or as zeros, of the routed experts' weights of the
            checkpoint that this model was pruned from.
        original: that checkpoint; found through the parents that records name by default.
        data: text to decide on: file, folder, source, mix or hub id.
        heldout: text to prove the result on; by default a tenth of data, which is kept apart for it.
        max_tokens: tokens of data, at most, shared by its domains.
        seq_len: tokens a row; the model's limit if that is less.
        batch_size: rows a pass.
        plan: also write what was decided to this file.
        from_plan: carry this plan out again instead: the same zeros without a text.
        write: write the sparse model, or the plan alone.
        proof: measure what it costs, against magnitudes at the same sparsity.
        proof_tokens: held-out tokens, at most, an equal share of each domain.
        window: longest context of the proof in tokens (default: the model's, ≤ 1024)
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: where layers run: cpu, cuda, ...
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        out: folder of the smaller model; None writes the plan alone.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit sparsify` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(SparsifyOptions, SparsifyResult, dict(locals()))


def further_inputs(options: SparsifyOptions) -> list[tuple[str, str]]:
    """The model that a stored plan names."""
    return inputs_of_plan(options)


def settle(options: SparsifyOptions, out: Path | None, overwrite: bool) -> tuple[SparsifyOptions, Path, bool]:
    """Without `out` the plan alone is written."""
    return model_or_plan(options, out, overwrite)


def check(options: SparsifyOptions) -> None:
    """Refuse an unknown method, impossible knobs and shares, and a run without what it needs."""
    resolve_device(options.device)
    if check_decided(options):
        return
    method = method_of(options)
    if options.sparsity is not None and options.total is not None:
        raise BadConfig("sparsity and total are both given", hint="one follows from the other: leave one out")
    if options.sparsity is None and options.total is None and method.fixed_sparsity is None:
        raise BadConfig("nothing says how many weights go", hint="--sparsity 0.5, or --total 0.65")
    if options.sparsity is not None:
        check_sparsity(options.sparsity, method.fixed_sparsity)
    check_texts(options)


def estimate(options: SparsifyOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """As large as the model: zeros are stored."""
    return estimate_of(options, out, sizes, lambda: ask(options, request_of, 0))


def run(options: SparsifyOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what is impossible, calibrate, decide, prove, write, check."""
    check(options)
    progress, scratch, out = context.progress, context.scratch, context.out
    asked = ask(options, request_of, context.seed, progress)
    writes_plan = options.write == "plan"
    check_disk(out, scratch, asked.plan_bytes if writes_plan else asked.written, asked.between)
    decided = decide(options, asked, scratch, progress)
    plan = decided.plan
    log_warnings(plan.file.warnings)
    if not writes_plan:
        machine = Placed(options.device, named_dtype(options.dtype))
        with plan_beside(plan, options.plan, overwrite=context.overwrite):
            return finish(decided, asked.source, machine, context, summary_of)
    save_plan(plan, out, overwrite=context.overwrite)
    return summary_of(plan, None)
