"""What a job asks that leaves every expert and changes its weights: of which model, and what is known before any work.

Legend: E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from moekit import catalogue
from moekit._progress import Progress
from moekit.checkpoint.quantized.registry import kind, quantization
from moekit.checkpoint.spec import MoESpec
from moekit.compress.budget.bits import BitBudget
from moekit.compress.budget.width import WidthBudget
from moekit.compress.engine.dense_cuts import InputCut
from moekit.compress.engine.layout import prepare
from moekit.compress.engine.making import REMEMBERED
from moekit.compress.engine.method import WeightMethod
from moekit.compress.engine.mtp import Mtp
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.sharing import BitSharer, read_sharer
from moekit.errors import BadConfig, MoekitError, UnsupportedModel
from moekit.jobs.options.inplace import InPlaceOptions
from moekit.jobs.shared.inputs import record_bytes
from moekit.jobs.shared.opened import OpenedModel, open_source
from moekit.jobs.weights.dense_parts import sized_cuts
from moekit.jobs.weights.plans import PLAN_BYTES, plan_path
from moekit.jobs.weights.sizes import bytes_between, layer_bytes, memory_of, precision_of
from moekit.jobs.weights.texts import TEXT_FIELDS, refuse_unread
from moekit.trace.cost import cost_of, sizes_of
from moekit.trace.recording import Recording

O = TypeVar("O", bound=InPlaceOptions)  # noqa: E741
# Logits, their logarithms and their gradient, float32 all of them, at the end of a whole model; and room for the rest.
_LOGITS, _ROOM = 3 * 4, 1 << 30
# Of a second moment's number; and copies of one while a matrix is made by it, or a plan is hashed and written.
_NUMBER, _COPIES = 8, 3


@dataclass(frozen=True)
class Asked:
    """A request that this model can fulfil, or a stored plan of it.

    Attributes:
        source: the model.
        request: method and budget; None where a stored plan has decided.
        plan: that plan; None where it is still to be decided.
        nbytes: of the result's files.
        between: bytes on disk while the work runs.
        memory: bytes of memory while layers run.
        plan_bytes: of the plan's two files, at most.
    """

    source: OpenedModel
    request: PlanRequest | None
    plan: WeightPlan | None
    nbytes: int
    between: int
    memory: int
    plan_bytes: int

    @property
    def written(self) -> int:
        """Bytes of the folder, with its records."""
        return self.nbytes + record_bytes(self.source.checkpoint.tensors.values())


def proves(options: InPlaceOptions) -> bool:
    """Whether held-out text is measured."""
    return options.proof and options.write == "model"


def reads_whole(method: WeightMethod[Any, Any]) -> bool:
    """Whether a method looks at what only a whole model in memory shows: gradients."""
    return bool(method.required) and bool(Recording(statistics=method.required).whole_model)


def mtp_of(outcomes: Mapping[int, LayerOutcome], cuts: Mapping[str, InputCut] | None = None) -> Mtp:
    """What becomes of multi-token-prediction layers: copied, unless parts of them would have another width."""
    return "drop" if cuts or any(outcome.width is not None for outcome in outcomes.values()) else "keep"


def method_of(options: InPlaceOptions) -> WeightMethod[Any, Any]:
    """The method that was asked for, with its settings."""
    method: WeightMethod[Any, Any] = catalogue.make(options.kind, str(options.method), options.settings)
    return method


def stored_plan(options: InPlaceOptions) -> WeightPlan | None:
    """The plan that is to be carried out; None where none is named.

    Raises:
        BadData: it is not there, or damaged.
    """
    return None if options.from_plan is None else WeightPlan.load(plan_path(options.from_plan), options.kind)


def inputs_of_plan(options: InPlaceOptions) -> list[tuple[str, str]]:
    """What a stored plan names, as inputs of the job: its model, and its text where that must be gone through again."""
    if options.from_plan is not None and plan_path(options.from_plan).is_file():
        with contextlib.suppress(MoekitError):  # told where the plan is read
            plan = stored_plan(options)
            if plan is not None:
                text = plan.file.calibrated.get("data") if plan.made_on_text else None
                return [("model", plan.file.model), *([("text", text)] if text else [])]
    return []


def check_decided(options: InPlaceOptions) -> bool:
    """Whether a stored plan has decided everything.

    Raises:
        BadConfig: something that it has decided is given as well, or nothing but a plan would be written; or, without a
            plan, model or method are missing.
    """
    if options.from_plan is not None:
        given = options.given("model", "method", "settings", *options.budget, "data", "plan", *TEXT_FIELDS)
        if given or options.write == "plan":
            what = f"{', '.join(given)} given as well" if given else "only a plan is to be written"
            raise BadConfig(f"a stored plan is to be carried out, but {what}", hint="leave that out")
        return True
    if options.model is None or options.method is None:
        hint = f"moekit {options.kind} MODEL --method METHOD, or --from PLAN"
        raise BadConfig("model and method are missing", hint=hint)
    return False


def check_texts(options: InPlaceOptions, further: str = "") -> None:
    """Refuse a run without the text that it needs, and a text's layout without the text.

    Args:
        options: of the job.
        further: what else decides from a text; "" for nothing.

    Raises:
        BadConfig: naming what is missing.
    """
    method = method_of(options)
    if options.data is None and further:
        raise BadConfig(f"{further} decides from a text", hint="give text (--data)")
    if options.data is None and (method.required or method.sequential):
        needs = ", ".join(method.required) or "activations"
        raise BadConfig(f"{options.method} decides from {needs}", hint="give text (--data)")
    refuse_unread(options)
    if proves(options) and options.data is None and options.heldout is None:
        raise BadConfig(
            "there is no text to prove the result on", hint="give --heldout TEXT, or say --no-proof to go without"
        )


def ask(
    options: O,
    request_of: Callable[[O, OpenedModel, int], PlanRequest],
    seed: int,
    progress: Progress | None = None,
) -> Asked:
    """Open the model, and refuse what it cannot fulfil; no weight is read.

    Args:
        options: of the job.
        request_of: (options, model, seed) -> what the kind asks for.
        seed: of everything random.
        progress: told of downloads.

    Raises:
        BadCheckpoint: damaged, or not what its config says.
        BadConfig: a budget that cannot be met, or a plan of another model.
        UnsupportedModel: the weights are quantized, or experts cannot be told apart on disk.
    """
    plan = stored_plan(options)
    source = open_source(str(options.model) if plan is None else plan.file.model, progress)
    _refuse_quantized(source)
    if plan is not None:
        plan.check_model(source.checkpoint.fingerprint, source.checkpoint.path)
    request = request_of(options, source, seed) if plan is None else None
    outcomes = any_outcomes(source, request.budget) if request is not None else plan.outcomes if plan else {}
    method = method_of(options) if plan is None else plan.method
    cuts = sized_cuts(source, method) if plan is None else plan.file.cuts
    nbytes = prepare(source.checkpoint, outcomes, mtp=mtp_of(outcomes, cuts), cuts=cuts).nbytes
    shared = _shared(request.budget if request is not None else plan.file.budget if plan is not None else None)
    whole = _backward_bytes(source, options, method) if plan is None and reads_whole(method) else 0
    return Asked(
        source,
        request,
        plan,
        nbytes,
        _between(options, source, method, plan, shared),
        max(memory_of(source, options), whole)
        + _moment_bytes(method, source)
        + (_whole_bytes(options, source) if request is not None and _reads_loss(shared) else 0),
        PLAN_BYTES,
    )


def any_outcomes(source: OpenedModel, budget: Any) -> dict[int, LayerOutcome]:
    """Outcomes of the right sizes: how large the result is does not depend on what is decided."""
    made = {}
    for layer, geometry in source.geometries.items():
        narrower = isinstance(budget, WidthBudget) and budget.width != geometry.width
        made[layer] = LayerOutcome(keep=tuple(range(geometry.experts)), width=budget.width if narrower else None)
    return made


def _refuse_quantized(source: OpenedModel) -> None:
    settings = quantization(source.checkpoint.config)
    if settings is not None:
        raise UnsupportedModel(
            f"the weights are quantized ({kind(settings)}): they cannot be changed and quantized again",
            file=source.checkpoint.path,
            hint="give the unquantized checkpoint",
        )


def _moment_bytes(method: WeightMethod[Any, Any], source: OpenedModel) -> int:
    """Bytes of the second moments of one expert, and of what is made of them; of other statistics little is there.

    Where the same are asked for again and again, those of one layer as far as they are remembered.
    """
    if not method.made_on_text:
        return 0
    one = _NUMBER * _COPIES * max(g.hidden**2 + g.width**2 for g in source.geometries.values())
    layer = _NUMBER * max(g.experts * g.width**2 for g in source.geometries.values())
    return one + (0 if method.sequential else min(layer, REMEMBERED))


def _backward_bytes(source: OpenedModel, options: InPlaceOptions, method: WeightMethod[Any, Any]) -> int:
    """Bytes of memory of a whole model, and of what a backward pass through it keeps."""
    config, wide = source.checkpoint.config, precision_of(source, options)
    rows, positions = options.batch_size, min(options.seq_len, source.longest)
    vocabulary = MoESpec.from_config(config).vocabulary
    sizes = sizes_of(config, rows=rows, positions=positions, itemsize=wide.running)
    kept = 0 if sizes is None else int(cost_of(Recording(statistics=method.required), sizes)[0].memory)
    return source.nbytes * wide.running // wide.stored + kept + _LOGITS * rows * positions * vocabulary + _ROOM


def _between(
    options: InPlaceOptions,
    source: OpenedModel,
    method: WeightMethod[Any, Any],
    plan: WeightPlan | None,
    shared: BitSharer | None,
) -> int:
    on_text, passes, most = method.made_on_text, 0, options.max_tokens
    if plan is None and options.data is not None:
        passes = (2 if method.reads_weights else 1) + (1 if on_text and not method.sequential else 0)
    elif plan is not None and on_text:
        passes, most = 1, plan.file.calibrated.get("max_tokens")
    if plan is None and shared is not None and shared.measures != "nothing":
        # Of the model as it is once more; with gradients at every layer where the loss is asked.
        passes += len(source.geometries) if _reads_loss(shared) else 1
        # Each further round makes the rounded model and is measured on it; gradients lie where the last ones lay.
        passes += 2 * (int(getattr(shared, "rounds", 1)) - 1)
    # What a layer's experts were given is kept beside the states where second moments are made of it.
    tokens = (passes + (1 if on_text else 0)) * (most or (1 << 20)) if passes else 0
    proof = (options.proof_tokens or (1 << 20)) if proves(options) else 0
    variants = 2 if shared is None or not proof else 4
    # Of the plan, and of others like it: its two baselines where they are made alike, or shares in other ways.
    each = 3 if variants == 4 or (on_text and not method.sequential and proof) else 1
    made = sum(layer_bytes(source).values()) * each if on_text else 0
    return bytes_between(source, options, tokens=tokens, proof_tokens=proof, variants=variants, made=made)


def _shared(budget: Any) -> BitSharer | None:
    """What shares a mean number of bits; None where nothing is shared."""
    return read_sharer(budget.share) if isinstance(budget, BitBudget) and budget.mean is not None else None


def _reads_loss(sharer: BitSharer | None) -> bool:
    return sharer is not None and sharer.measures == "loss"


def _whole_bytes(options: InPlaceOptions, source: OpenedModel) -> int:
    """Bytes of the whole model in memory, which the loss is differentiated with."""
    wide = precision_of(source, options)
    return source.nbytes * wide.running // wide.stored
