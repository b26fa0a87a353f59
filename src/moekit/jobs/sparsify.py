"""`use: sparsify`: zero single weights of the experts, prove what that costs, and write the sparse model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moekit import catalogue
from moekit._device import DtypeName, named_dtype, resolve_device
from moekit.checkpoint import atomic_folder
from moekit.compress.budget.parents import Original, expert_weights, find_original
from moekit.compress.budget.sparsity import SparsityBudget, remaining_sparsity, total_sparsity
from moekit.compress.engine.layout import prepare
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.zeroing import SparsifyMethod, check_sparsity
from moekit.data import Document
from moekit.data.encoding import Bos
from moekit.errors import BadConfig, MoekitError, UnsupportedModel
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.options.sparsify import SparsifyOptions
from moekit.jobs.shared.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.shared.hashes import text_hash
from moekit.jobs.shared.inputs import calibration_rows, model_item, record_bytes, text_item
from moekit.jobs.shared.opened import OpenedModel, open_source
from moekit.jobs.shared.outputs import model_or_plan
from moekit.jobs.shared.pruning import PLAN_FILE, bytes_between, check_disk
from moekit.jobs.shared.sparse import Placed, finish, log_warnings, summary_of
from moekit.jobs.shared.texts import heldout_of_plan, read_texts
from moekit.progress import ProgressLike

logger = logging.getLogger(__name__)
# What a stored plan has decided already.
_DECIDED = ("model", "method", "settings", "sparsity", "total", "original", "data", "plan")


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
    plan: str | None = None,
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


def settle(options: SparsifyOptions, out: Path | None, overwrite: bool) -> tuple[SparsifyOptions, Path, bool]:
    """Without `out` the plan alone is written."""
    return model_or_plan(options, out, overwrite)


def check(options: SparsifyOptions) -> None:
    """Refuse an unknown method, impossible knobs and shares, and a run without what it needs."""
    resolve_device(options.device)
    if options.from_plan is not None:
        given = [name for name in _DECIDED if getattr(options, name)]
        if given or options.write == "plan":
            what = f"{', '.join(given)} given as well" if given else "only a plan is to be written"
            raise BadConfig(f"a stored plan is to be carried out, but {what}", hint="leave that out")
        return
    if options.model is None or options.method is None:
        raise BadConfig("model and method are missing", hint="moekit sparsify MODEL --method METHOD, or --from PLAN")
    method = _method(options)
    if options.sparsity is not None and options.total is not None:
        raise BadConfig("sparsity and total are both given", hint="one follows from the other: leave one out")
    if options.sparsity is None and options.total is None and method.fixed_sparsity is None:
        raise BadConfig("nothing says how many weights go", hint="--sparsity 0.5, or --total 0.65")
    if options.sparsity is not None:
        check_sparsity(options.sparsity, method.fixed_sparsity)
    if options.data is None and (method.required or method.sequential):
        needs = ", ".join(method.required) or "activations"
        raise BadConfig(f"{options.method} decides from {needs}", hint="give text (--data)")
    if _proves(options) and options.data is None and options.heldout is None:
        raise BadConfig(
            "there is no text to prove the result on", hint="give --heldout TEXT, or say --no-proof to go without"
        )


def estimate(options: SparsifyOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """As large as the model: zeros are stored."""
    reference = options.model
    reads = [text_item(text, sizes) for text in (options.data, options.heldout) if text]
    if options.from_plan is not None:
        reads.append(sizes.item(options.from_plan))
        reference = _stored(options).file.model if _plan_path(options.from_plan).is_file() else None
    if reference is None:
        return JobEstimate(tuple(reads), (Item(str(out), None),))
    model = model_item(reference, sizes)
    notes = ("layers are read from disk one at a time: memory does not grow with their number",)
    if options.write == "plan":
        return JobEstimate((model, *reads), (Item(str(out), 16 << 20),), disk=16 << 20, notes=notes)
    if model.nbytes is None or not (Path(reference).expanduser() / "config.json").is_file():
        return JobEstimate((model, *reads), (Item(str(out), model.nbytes),), disk=model.nbytes, notes=notes)
    source = open_source(reference)
    if options.from_plan is None:
        _request(options, source, 0)
    nbytes = _foresee(source) + record_bytes(source.checkpoint.tensors.values())
    disk = nbytes + _between(options, source)
    return JobEstimate((model, *reads), (Item(str(out), nbytes),), disk=disk, memory=1 << 30, notes=notes)


def run(options: SparsifyOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what is impossible, calibrate, decide, prove, write, check."""
    check(options)
    plan = None if options.from_plan is None else _stored(options)
    source = open_source(str(options.model) if plan is None else plan.file.model, context.progress)
    if plan is not None:
        plan.check_model(source.checkpoint.fingerprint, source.checkpoint.path)
    request = None if plan is not None else _request(options, source, context.seed)
    nbytes = _foresee(source)
    if options.write == "model":
        check_disk(context.out, context.scratch, nbytes, _between(options, source))
    if request is None:
        assert plan is not None
        heldout = heldout_of_plan(plan, options, source, context) if _proves(options) else None
    else:
        apart = options.heldout is None
        documents, heldout = read_texts(options, source, context, apart=apart, proves=_proves(options))
        plan = _plan(options, documents, source, request, context)
    log_warnings(plan.file.warnings)
    if options.plan is not None:
        plan.save(options.plan)
    if options.write == "model":
        return finish(plan, source, heldout, Placed(options.device, named_dtype(options.dtype)), context)
    _save_plan(plan, context)
    return summary_of(plan, None)


def _proves(options: SparsifyOptions) -> bool:
    return options.proof and options.write == "model"


def _method(options: SparsifyOptions) -> SparsifyMethod:
    method: SparsifyMethod = catalogue.make("sparsify", str(options.method), options.settings)
    return method


def _stored(options: SparsifyOptions) -> WeightPlan:
    return WeightPlan.load(_plan_path(str(options.from_plan)), kind="sparsify")


def _request(options: SparsifyOptions, source: OpenedModel, seed: int) -> PlanRequest:
    """What is asked for, in shares of the weights that are there.

    Raises:
        BadConfig: a total that cannot be met, or a parent that says how many weights there were is gone.
    """
    method, original = _method(options), _original(options, source)
    weights = None if original is None else original.weights
    if options.total is None:
        share = method.fixed_sparsity if options.sparsity is None else options.sparsity
        assert share is not None
        return PlanRequest(method, SparsityBudget(sparsity=share, original=weights), seed=seed)
    assert weights is not None
    removed = 1 - expert_weights(source.geometries) / weights
    share = remaining_sparsity(options.total, removed)
    if method.fixed_sparsity is not None:
        share = _fixed(method.fixed_sparsity, options.total, removed, source)
    budget = SparsityBudget(sparsity=share, total=options.total, original=weights)
    return PlanRequest(method, budget, seed=seed)


def _original(options: SparsifyOptions, source: OpenedModel) -> Original | None:
    try:
        return find_original(source.checkpoint, options.original)
    except MoekitError:
        if options.total is not None or options.original is not None:
            raise
        return None  # only a figure less to print


def _between(options: SparsifyOptions, source: OpenedModel) -> int:
    passes = 0
    if options.from_plan is None and options.data is not None:
        passes = 2 if _method(options).reads_weights else 1
    tokens = passes * (options.max_tokens or (1 << 20))
    proof = (options.proof_tokens or (1 << 20)) if _proves(options) else 0
    return bytes_between(source, tokens, proof, 2, 0)


def _plan(
    options: SparsifyOptions, documents: list[Document], source: OpenedModel, request: PlanRequest, context: JobContext
) -> WeightPlan:
    text = None
    if documents:
        tokenizer, length = source.tokenizer(), min(options.seq_len, source.longest)
        rows = calibration_rows(documents, tokenizer, seq_len=length, max_tokens=options.max_tokens, bos=options.bos)
        text = CalibrationText(
            list(rows.batches(options.batch_size)),
            context.scratch / "calibration",
            named_dtype(options.dtype),
            options.device,
            tokenizer,
            _origin(options),
        )
    plan = plan_weights(source.checkpoint, text, request, context.progress)
    kept = _named(options.data) if options.data is not None and options.heldout is None else ""
    return WeightPlan(
        plan.file.model_copy(update={"kept_apart": kept, "text_sha256": text_hash(options.data)}), plan.statistics
    )


def _origin(options: SparsifyOptions) -> str:
    """How the plan names its text: the part in brackets tells that the rest was kept apart."""
    name = _named(str(options.data))
    return name if options.heldout is not None else f"{name}[train]"


def _foresee(source: OpenedModel) -> int:
    """Bytes of the result's files; refuses what cannot be written, before any work.

    Raises:
        UnsupportedModel: the weights are quantized, or experts cannot be told apart on disk.
        BadConfig: the checkpoint carries a routing policy.
    """
    quantized = source.checkpoint.config.get("quantization_config")
    if quantized is not None:
        raise UnsupportedModel(
            f"the weights are quantized ({quantized.get('quant_method', '?')}): zeros cannot be put into them",
            file=source.checkpoint.path,
            hint="give the unquantized checkpoint, and quantize what comes out",
        )
    outcomes = {layer: LayerOutcome(keep=tuple(range(g.experts))) for layer, g in source.geometries.items()}
    return prepare(source.checkpoint, outcomes, mtp="keep").nbytes


def _fixed(share: float, total: float, removed: float, source: OpenedModel) -> float:
    """The share that a pattern fixes, where it meets the total.

    Raises:
        BadConfig: it does not; names the total that it gives.
    """
    whole = total_sparsity(removed, share)
    inputs = max(max(g.hidden, g.width) for g in source.geometries.values())
    if abs(whole - total) > 1 / inputs:
        raise BadConfig(
            f"the total is to be {total:g}, but {removed:g} is removed and the pattern zeroes exactly {share:g} of the "
            f"rest, {whole:g} in all",
            hint=f"ask for a total of {whole:.6g}, for pattern=unstructured, or remove other experts",
        )
    return share


def _named(reference: str) -> str:
    """A text as a reader in another working folder finds it."""
    path = Path(reference).expanduser()
    return str(path.resolve()) if path.exists() else reference


def _plan_path(reference: str) -> Path:
    path = Path(reference).expanduser()
    return path / PLAN_FILE if path.is_dir() else path


def _save_plan(plan: WeightPlan, context: JobContext) -> None:
    """As a file of that name, or in a folder, whole or not at all."""
    if context.out.suffix == ".json":
        plan.save(context.out)
        return
    with atomic_folder(context.out, overwrite=context.overwrite) as folder:
        plan.save(folder / PLAN_FILE)
