"""What pruning is asked for, of which model, and what is known of the result before any work."""

from __future__ import annotations

from dataclasses import dataclass

from moekit import catalogue
from moekit._progress import Progress
from moekit.compress.engine.repairing import BlockRepair
from moekit.compress.engine.request import PlanRequest
from moekit.data.forcing import refuse_reader
from moekit.jobs.options.fewer import FewerOptions
from moekit.jobs.shared.inputs import record_bytes
from moekit.jobs.shared.opened import OpenedModel, open_source
from moekit.jobs.weights.mtp import check_mtp
from moekit.jobs.weights.protection import SUPER, parse_protected
from moekit.jobs.weights.sizes import ResultSize, budget_of, bytes_between, memory_of, rewritten_bytes, size_of_result


@dataclass(frozen=True)
class Asked:
    """A request that this model can fulfil.

    Attributes:
        source: the model.
        request: method, budget, and what bounds them.
        size: of the result.
        between: bytes on disk while the work runs.
        memory: bytes of memory while layers run.
    """

    source: OpenedModel
    request: PlanRequest
    size: ResultSize
    between: int
    memory: int

    @property
    def written(self) -> int:
        """Bytes of the folder, with its records."""
        return self.size.nbytes + record_bytes(self.source.checkpoint.tensors.values())


def proves(options: FewerOptions) -> bool:
    """Whether held-out text is measured."""
    return options.proof and options.write == "model"


def ask(options: FewerOptions, seed: int, progress: Progress | None = None) -> Asked:
    """Open the model, and refuse what it cannot fulfil; no weight is read.

    Raises:
        BadCheckpoint: damaged, or not what its config says.
        BadConfig: a budget that the model cannot have, or protected experts that it does not.
        UnsupportedModel: no Mixture of Experts, or experts that cannot be told apart on disk.
    """
    source = open_source(options.model, progress)
    if options.self_generated is not None:
        refuse_reader(source.checkpoint.config, "prompts cannot be answered (--self-generated)")
    if options.protect == SUPER:
        refuse_reader(source.checkpoint.config, "super experts cannot be found (--protect super)")
    method = catalogue.make(options.kind, options.method, options.settings)
    budget = budget_of(options.keep, options.scope, options.least, options.most)
    listed = options.protect is not None and options.protect != SUPER
    protected = parse_protected(str(options.protect), source) if listed else None
    repair = None if options.repair == "none" else BlockRepair(ridge=options.ridge)
    request = PlanRequest(method, budget, options.top_k, options.groups, seed, protected, repair)
    check_mtp(source.checkpoint, options.mtp, request, options.data is not None)
    size = size_of_result(source, request, options.method, stock_only=options.stock_only, mtp=options.mtp)
    memory = memory_of(source, options) + (0 if repair is None else _repair_bytes(options, source))
    return Asked(source, request, size, _between(options, source, size, request), memory)


def _repair_bytes(options: FewerOptions, source: OpenedModel) -> int:
    """Bytes of what a layer lacks at each token, and of the moments of one expert and what is made of them."""
    tokens = options.max_tokens or (1 << 20)
    sizes = source.geometries.values()
    return max(4 * tokens * g.hidden + 8 * 3 * g.width * (g.width + g.hidden) for g in sizes)


def _between(options: FewerOptions, source: OpenedModel, size: ResultSize, request: PlanRequest) -> int:
    tokens = 0 if options.data is None else options.max_tokens or (1 << 20)
    # What a layer's experts are given is kept beside the states where their activations are compared.
    tokens *= (2 if request.method.passes in ("search", "sequential") else 1) + request.method.reads_inner
    if request.repair is not None:
        # One more pass, beside it what experts were given before and are given now; and the layers of each variant.
        tokens += 3 * (options.max_tokens or (1 << 20))
    proof = (options.proof_tokens or (1 << 20)) if proves(options) else 0
    variants = 2 + options.random_seeds
    rewritten = rewritten_bytes(source, size, request)
    if request.repair is not None and proof:
        rewritten *= variants
    return bytes_between(
        source,
        options,
        tokens=tokens,
        proof_tokens=proof,
        variants=variants,
        rewritten=rewritten,
    )
