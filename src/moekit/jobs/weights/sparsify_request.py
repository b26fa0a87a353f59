"""What zeroing is asked for, of which model, and what is known of the result before any work."""

from __future__ import annotations

from dataclasses import dataclass

from moekit import catalogue
from moekit._progress import Progress
from moekit.compress.budget.parents import Original, expert_weights, find_original
from moekit.compress.budget.sparsity import SparsityBudget, remaining_sparsity, total_sparsity
from moekit.compress.engine.layout import prepare
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.zeroing import SparsifyMethod
from moekit.errors import BadConfig, MoekitError, UnsupportedModel
from moekit.jobs.options.sparsify import SparsifyOptions
from moekit.jobs.shared.inputs import record_bytes
from moekit.jobs.shared.opened import OpenedModel, open_source
from moekit.jobs.weights.plans import plan_path
from moekit.jobs.weights.sizes import bytes_between, memory_of


@dataclass(frozen=True)
class Asked:
    """A request that this model can fulfil, or a stored plan of it.

    Attributes:
        source: the model.
        request: method and shares; None where a stored plan has decided.
        plan: that plan; None where it is still to be decided.
        nbytes: of the result's files.
        between: bytes on disk while the work runs.
        memory: bytes of memory while layers run.
    """

    source: OpenedModel
    request: PlanRequest | None
    plan: WeightPlan | None
    nbytes: int
    between: int
    memory: int

    @property
    def written(self) -> int:
        """Bytes of the folder, with its records."""
        return self.nbytes + record_bytes(self.source.checkpoint.tensors.values())


def proves(options: SparsifyOptions) -> bool:
    """Whether held-out text is measured."""
    return options.proof and options.write == "model"


def method_of(options: SparsifyOptions) -> SparsifyMethod:
    """The method that was asked for, with its settings."""
    method: SparsifyMethod = catalogue.make("sparsify", str(options.method), options.settings)
    return method


def stored_plan(options: SparsifyOptions) -> WeightPlan | None:
    """The plan that is to be carried out; None where none is named.

    Raises:
        BadData: it is not there, or damaged.
    """
    return None if options.from_plan is None else WeightPlan.load(plan_path(options.from_plan), "sparsify")


def ask(options: SparsifyOptions, seed: int, progress: Progress | None = None) -> Asked:
    """Open the model, and refuse what it cannot fulfil; no weight is read.

    Raises:
        BadCheckpoint: damaged, or not what its config says.
        BadConfig: a total that cannot be met, a plan of another model, or a parent is gone that says how many weights
            there were.
        UnsupportedModel: the weights are quantized, or experts cannot be told apart on disk.
    """
    plan = stored_plan(options)
    source = open_source(str(options.model) if plan is None else plan.file.model, progress)
    if plan is not None:
        plan.check_model(source.checkpoint.fingerprint, source.checkpoint.path)
    request = _request(options, source, seed) if plan is None else None
    return Asked(source, request, plan, _foresee(source), _between(options, source), memory_of(source, options))


def _request(options: SparsifyOptions, source: OpenedModel, seed: int) -> PlanRequest:
    """What is asked for, in shares of the weights that are there.

    Raises:
        BadConfig: a total that cannot be met, or a parent that says how many weights there were is gone.
    """
    method, original = method_of(options), _original(options, source)
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
        passes = 2 if method_of(options).reads_weights else 1
    tokens = passes * (options.max_tokens or (1 << 20))
    proof = (options.proof_tokens or (1 << 20)) if proves(options) else 0
    return bytes_between(source, options, tokens=tokens, proof_tokens=proof, variants=2)


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
            hint=f"ask for a total of {whole:.6g}, for --set pattern=unstructured, or remove other experts",
        )
    return share
