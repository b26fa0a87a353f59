"""`use: quantize`: round the weights of the experts to few bits, prove what that costs, and write the rounded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moekit._device import DtypeName, named_dtype, resolve_device
from moekit._memory import require_memory
from moekit.data.encoding import Bos
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, JobEstimate
from moekit.jobs.options.quantize import QuantizeOptions
from moekit.jobs.shared.outputs import model_or_plan
from moekit.jobs.weights.inplace_decide import decide
from moekit.jobs.weights.inplace_finish import Placed, finish, log_warnings
from moekit.jobs.weights.inplace_job import estimate_of
from moekit.jobs.weights.inplace_request import ask, check_decided, check_texts, inputs_of_plan
from moekit.jobs.weights.plans import plan_beside, save_plan
from moekit.jobs.weights.quantize_request import budget_of, method_of, others_of, request_of, sharing_needs, summarizer
from moekit.jobs.weights.sizes import check_disk
from moekit.progress import ProgressLike


class QuantizeResult(JobResult):
    """How the weights were rounded, and what that costs.

    Attributes:
        method: what rounded.
        settings: its knobs.
        bits: part of an expert -> bits a weight, where all experts have the same; empty where a mean was shared.
        mean_bits: bits a weight that were to be shared, how, and what got one width; None without.
        model: what was rounded.
        plan: hash of the plan.
        tokens: that were decided on.
        weights: how many were rounded, bits each takes packed (scales and zero points counted), bytes that they take
            in the folder, and packed.
        bytes: of the folder's tensors, and what they would be with the rounded weights packed.
        layers: each with bits, widths and how many experts have them, experts that no token chose, and the method's
            figures.
        warnings: what a reader must know of the data.
        proof: held-out text and blocks' errors, against plain rounding and other shares; None where nothing was proved.
        check: what the check of the written folder found; None where only a plan was written.
    """

    method: str
    settings: dict[str, Any]
    bits: dict[str, int]
    mean_bits: dict[str, Any] | None
    model: str
    plan: str
    tokens: int
    weights: dict[str, Any]
    bytes: dict[str, int]
    layers: list[dict[str, Any]]
    warnings: list[str]
    proof: dict[str, Any] | None = None
    check: dict[str, Any] | None = None


def quantize(
    model: str | Path | None = None,
    *,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    bits: int | str | None = None,
    mean_bits: float | None = None,
    choices: int | str | Sequence[int] | None = None,
    share: str | Mapping[str, Any] | None = None,
    unit: Literal["expert", "layer"] = "expert",
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
) -> QuantizeResult:
    """Round the weights of the routed experts to few bits (`moekit methods quantize`), kept in the source's dtype.

    The folder loads wherever the source does and is as large; `bytes` tells what a packed form would take.

    Args:
        model: MoE: folder or hub id; a stored plan names its own.
        method: how weights are rounded; see moekit methods quantize.
        settings: the method's own knobs; `group`: inputs that share a scale.
        bits: bits a weight, 1 to 8: one number, or by part ("gate=2,up=2,down=3").
        mean_bits: instead: bits a weight in the mean, at most, shared among the experts.
        choices: widths that an expert may get of a mean, 2, 3 and 4 by default.
        share: how a mean is shared: a name, or settings with `use` (moekit methods sharer); "pmq" by default.
        unit: what gets one width of a mean: each expert, or each layer, as engines can hold.
        data: text to decide on: file, folder, source, mix or hub id.
        heldout: text to prove the result on; by default a tenth of data, which is kept apart for it.
        max_tokens: tokens of data, at most, shared by its domains.
        seq_len: tokens a row; the model's limit if that is less.
        batch_size: rows a pass.
        plan: also write what was decided to this file.
        from_plan: carry this plan out again instead: the same rounding. Of `gptq` the text that the plan names is read.
        write: write the rounded model, or the plan alone.
        proof: measure what it costs, against plain rounding to the same bits and other shares of the same mean.
        proof_tokens: held-out tokens, at most, an equal share of each domain.
        window: longest context of the proof in tokens (default: the model's, ≤ 1024)
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: where layers run: cpu, cuda, ...
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        out: folder of the rounded model; None writes the plan alone.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit quantize` prints.

    Raises:
        BadConfig: an impossible option, groups that do not divide, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
        UnsupportedModel: the weights are quantized already.
        OutOfBudget: the disk, or the memory for second moments, is too small; said before the work.
    """
    return call(QuantizeOptions, QuantizeResult, dict(locals()))


def further_inputs(options: QuantizeOptions) -> list[tuple[str, str]]:
    """The model that a stored plan names, and its text where that must be gone through again."""
    return inputs_of_plan(options)


def settle(options: QuantizeOptions, out: Path | None, overwrite: bool) -> tuple[QuantizeOptions, Path, bool]:
    """Without `out` the plan alone is written."""
    return model_or_plan(options, out, overwrite)


def check(options: QuantizeOptions) -> None:
    """Refuse an unknown method, impossible knobs and bits, and a run without what it needs."""
    resolve_device(options.device)
    if check_decided(options):
        return
    method_of(options)
    check_texts(options, sharing_needs(budget_of(options)))


def estimate(options: QuantizeOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """As large as the model: rounded weights are stored in its dtype."""
    notes = ("rounded weights are stored in the source's dtype: the folder is as large as the source",)
    return estimate_of(options, out, sizes, lambda: ask(options, request_of, 0), notes)


def run(options: QuantizeOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what is impossible, calibrate, decide, prove, write, check."""
    check(options)
    progress, scratch, out = context.progress, context.scratch, context.out
    asked = ask(options, request_of, context.seed, progress)
    writes_plan = options.write == "plan"
    check_disk(out, scratch, asked.plan_bytes if writes_plan else asked.written, asked.between)
    if asked.request is not None and (asked.request.method.required or options.share is not None):
        hint = "use --method rtn" if options.mean_bits is None else "use --method rtn, and share by pmq or frequency"
        require_memory(asked.memory, "rounding with second moments, or sharing by the loss,", hint)
    decided = decide(options, asked, scratch, progress, others_of)
    plan = decided.plan
    log_warnings(plan.file.warnings)
    summary = summarizer(asked.source)
    if not writes_plan:
        machine = Placed(options.device, named_dtype(options.dtype))
        with plan_beside(plan, options.plan, overwrite=context.overwrite):
            return finish(decided, asked.source, machine, context, summary)
    save_plan(plan, out, overwrite=context.overwrite)
    result: dict[str, Any] = summary(plan, None)
    return result
