"""`use: train`: train or fine-tune a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from moekit._ranks import is_first_rank
from moekit._validation import faults
from moekit.checkpoint import Checkpoint, fingerprint_model
from moekit.checkpoint.folder import read_tensors
from moekit.checkpoint.precision import stored_form
from moekit.checkpoint.stored import mark_stored
from moekit.data.text import Document
from moekit.errors import BadConfig
from moekit.experts.methods.factored import Factored
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate, total
from moekit.jobs.options.train import TrainOptions
from moekit.jobs.shared.adapters import adapter_scratch, check_adapter, place_adapter, settle_adapter
from moekit.jobs.shared.inputs import (
    changed_bytes,
    lies_here,
    model_item,
    model_location,
    open_model,
    read_text,
    save_changed,
    text_item,
)
from moekit.jobs.shared.ranked import check_ranks, deal_out, ranks_of
from moekit.jobs.shared.rehearsal import refuse_broken
from moekit.jobs.shared.teachers import refuse_other_tokenizer
from moekit.jobs.weights.experts_parts import attach_experts, check_experts, experts_part
from moekit.parallel.checkpoints.gathering import gather_state
from moekit.parallel.data_parallel import RankedTraining
from moekit.parallel.launch.start import StartedRanks
from moekit.progress import ProgressLike
from moekit.training import TrainConfig, train as train_model
from moekit.training.teacher import LiveTeacher, Teacher
from moekit.training.teacher_store import store_teacher
from moekit.training.texts import MAIN, read_rows

# Weights, gradients and two moments of Adam, four bytes each, for weights that may be stored in two.
_TRAINING_FACTOR = 8
# Matrices that residuals stand in for stay beside them.
_WITH_FACTORS = 2


class TrainResult(JobResult):
    """What a run of training did.

    Attributes:
        steps: optimizer steps, of this process and those it continued.
        tokens: trained on, padding left out.
        seconds: spent in steps.
        losses: language-modelling loss of each step, without router losses.
        heldout_losses: step -> loss on held-out text.
        routing: routing figures of the last steps.
        precision: of matrix products.
        trained: part -> parameters that trained.
        parameters: of the model.
        resumed_from: step that this process continued from.
        notes: what a reader of the figures must know, such as layers whose routing is not told.
        tokens_per_second: over the run.
        final_loss: of the last step.
    """

    steps: int
    tokens: int
    seconds: float
    losses: list[float]
    heldout_losses: dict[Any, float]
    routing: dict[str, Any] | None
    precision: str
    trained: dict[str, int]
    parameters: int
    resumed_from: int | None
    notes: list[str]
    tokens_per_second: float
    final_loss: float


def train(
    model: str | Path,
    *,
    data: TextLike,
    texts: Mapping[str, TextLike] | None = None,
    teacher: str | Path | None = None,
    teacher_top_k: int | None = None,
    plan: str | Path | None = None,
    experts: str | Mapping[str, Any] | None = None,
    basis_plan: str | Path | None = None,
    split: Literal["train", "heldout"] | None = None,
    heldout: TextLike | None = None,
    device: str = "auto",
    data_parallel: Literal["ddp", "fsdp"] = "ddp",
    settings: Mapping[str, Any] | None = None,
    keep_adapter: str | Path | None = None,
    ep: int = 1,
    nodes: int = 1,
    dispatch: str = "once-per-rank",
    placement: str | Path | None = None,
    codec: Literal["none", "int8"] = "none",
    saved_as: Literal["source", "float32"] = "source",
    drop_unknown: bool = False,
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> TrainResult:
    """Train a model on text, under the routing policy that it carries or is given; a killed run resumes exactly.

    Args:
        model: model: folder or hub id.
        data: training text: file, folder, source, mix or hub id.
        texts: further texts by name, which objectives read by their setting `text`.
        teacher: model that the objective kd holds the output against: folder or hub id.
        teacher_top_k: ask the teacher beforehand and keep so many of its likeliest tokens on disk.
        plan: routing plan to train under; the checkpoint's by default.
        experts: what to put in the experts' place before training: its name, or its settings with `use`.
        basis_plan: merge plan whose groups share a basis, with experts {use: factored, ...}.
        split: part of the text to take.
        heldout: text whose loss is watched.
        device: cpu, cuda, ..., or auto: a GPU if there is one.
        data_parallel: under --ep: what is no expert lies whole on every rank, or is dealt out (FSDP2)
        settings: steps, lr, objectives, ...: TrainConfig.
        keep_adapter: also write the adapter, as peft and servers read it, to this folder; only with lora.
        ep: ranks that share each layer's experts; start them with torchrun.
        nodes: nodes that these ranks stand in, for hierarchical dispatch.
        dispatch: how tokens travel; see moekit methods dispatch.
        placement: placement file: which rank holds which expert.
        codec: int8 sends hidden states in 8 bits; lossy.
        saved_as: dtype of the trained weights: that of the model, or float32, in which they learnt, to go on from.
        drop_unknown: leave out what the source holds beyond the model, such as extra layers.
        out: folder of the trained checkpoint.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit train` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
        UnsupportedModel: no Mixture of Experts, or something asked for needs router logits that it does not give.
    """
    return call(TrainOptions, TrainResult, dict(locals()))


def check(options: TrainOptions) -> None:
    """Refuse impossible settings."""
    config = config_of(options, 0)
    check_adapter(options.keep_adapter, learns=config.lora is not None, hint="say --lora '{}', or leave it out")
    if options.keep_adapter is not None and options.experts:
        raise BadConfig("an adapter of other experts does not go onto the model as it is", hint="leave one of both out")
    check_experts(options)
    check_ranks(options, divided=True)
    if options.teacher_top_k is not None and options.teacher is None:
        raise BadConfig("teacher_top_k is given, but no teacher", hint="say --teacher FOLDER")
    if MAIN in (options.texts or {}):
        raise BadConfig(f"the text {MAIN!r} is the one that `data` names", hint="give further texts other names")


def settle(options: TrainOptions, out: Path | None, overwrite: bool) -> tuple[TrainOptions, Path, bool]:
    """Keep the adapter's folder apart from the model's."""
    if out is None:
        raise BadConfig("nothing says where to write", hint="-o OUT, in Python out=")
    settle_adapter(options.keep_adapter, out)
    return options, out, overwrite


def config_of(options: TrainOptions, seed: int) -> TrainConfig:
    """The run's knobs.

    Raises:
        BadConfig: an unknown or impossible one.
    """
    try:
        return TrainConfig(**{"seed": seed, **options.settings})
    except ValidationError as error:
        raise BadConfig(f"training: {faults(error)}", hint="moekit train --help lists every option") from error


def estimate(options: TrainOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """The trained model, and a checkpoint with optimizer state while it runs."""
    model = model_item(options.model, sizes)
    texts = [
        text_item(item, sizes) for item in (options.data, options.heldout, *(options.texts or {}).values()) if item
    ]
    teachers = () if options.teacher is None else (model_item(options.teacher, sizes),)
    # A teacher whose answers are stored is gone before training; it is counted all the same, as it needs room first.
    factored = isinstance(experts_part(options), Factored)
    times = _TRAINING_FACTOR + (_WITH_FACTORS if factored else 0)
    needed = None if model.nbytes is None else times * model.nbytes + (total(t.nbytes for t in teachers) or 0)
    # What was learnt, then the model; two checkpoints with both moments where any are kept.
    copies = 2 if config_of(options, 0).save_every is None else 8
    kept = None if model.nbytes is None else copies * model.nbytes
    written = _written_bytes(options, model)
    if factored and written is not None and model.nbytes is not None:
        written += model.nbytes
    return JobEstimate((model, *teachers, *texts), (Item(str(out), written),), disk=kept, memory=needed)


def _written_bytes(options: TrainOptions, model: Item) -> int | None:
    nbytes = changed_bytes(options.model, model)
    if nbytes is None or options.saved_as == "source":
        return nbytes
    if not lies_here(options.model):
        return 2 * nbytes
    tensors = read_tensors(Path(options.model).expanduser()).values()
    return nbytes + sum(max(0, 4 * info.numel - info.nbytes) for info in tensors)


def run(options: TrainOptions, context: JobContext) -> dict[str, Any]:
    """Train and save."""
    check_ranks(options, divided=True)
    with ranks_of(options) as started:
        return _train(options, context, started)


def _train(options: TrainOptions, context: JobContext, started: StartedRanks | None) -> dict[str, Any]:
    config = config_of(options, context.seed)
    model, tokenizer = _open(options, context)
    refuse_broken(model.config.to_dict())
    distribution = None
    if started is not None:
        distribution = _distribute(options, model, started, config.model_dump(mode="json"))
    documents = read_text(options.data, split=options.split, seed=context.seed, progress=context.progress)
    heldout = (
        None if options.heldout is None else read_text(options.heldout, seed=context.seed, progress=context.progress)
    )
    named = {
        name: read_text(reference, seed=context.seed, progress=context.progress)
        for name, reference in (options.texts or {}).items()
    }
    result = train_model(
        model,
        tokenizer,
        {MAIN: documents, **named},
        config,
        output=context.scratch,
        heldout=heldout,
        progress=context.progress,
        distribution=distribution,
        teacher=_teacher(options, config, context, tokenizer, {MAIN: documents, **named}),
        adapter=adapter_scratch(options.keep_adapter, context),
    )
    if distribution is not None:
        model = _whole(options, model, context)
    if options.saved_as == "source":
        mark_stored(model, stored_form(Checkpoint.open(model_location(options.model))))
    scores = result.model_dump(mode="json", exclude={"history"})
    settings = {**config.model_dump(mode="json", exclude_defaults=True), "data": options.data}
    settings |= {name: getattr(options, name) for name in ("experts", "basis_plan") if getattr(options, name)}
    place_adapter(options.keep_adapter, context, options.model)
    save_changed(
        model,
        tokenizer,
        context,
        parent=options.model,
        config=settings,
        scores=scores,
        drop_unknown=options.drop_unknown,
    )
    return {**scores, "tokens_per_second": result.tokens_per_second, "final_loss": result.losses[-1]}


def _teacher(
    options: TrainOptions,
    config: TrainConfig,
    context: JobContext,
    tokenizer: Any,
    documents: Mapping[str, Sequence[Document]],
) -> Teacher | None:
    """The teacher itself, or what it said of the text that is asked about, stored in the scratch folder."""
    if options.teacher is None:
        return None
    model, own = open_model(options.teacher, plan=None, device=options.device, dtype="auto", progress=context.progress)
    refuse_other_tokenizer(tokenizer, own, options.teacher)
    if options.teacher_top_k is None:
        return LiveTeacher(model)
    texts = config.terms().taught_texts
    if len(texts) != 1:
        raise BadConfig(
            f"a stored teacher knows one text, and objectives ask it of {len(texts)}",
            hint="leave teacher_top_k out, or let one text be read by kd",
        )
    rows = read_rows(model, own, documents[next(iter(texts))], config, context.progress)
    folder = context.scratch / "teacher"
    return store_teacher(
        model, rows, folder, top_k=options.teacher_top_k, batch=config.batch, progress=context.progress
    )


def _open(options: TrainOptions, context: JobContext, device: str | None = None) -> tuple[Any, Any]:
    model, tokenizer = open_model(
        options.model, plan=options.plan, device=device or options.device, dtype="float32", progress=context.progress
    )
    attach_experts(options, model, seed=context.seed)
    return model, tokenizer


def _distribute(options: TrainOptions, model: Any, started: StartedRanks, settings: dict[str, Any]) -> RankedTraining:
    facts = {"model": fingerprint_model(model)}
    ranks = deal_out(model, options, started, shared_batch=False, facts=settings)
    distribution = RankedTraining(ranks, options.data_parallel, facts)
    distribution.prepare(model)
    return distribution


def _whole(options: TrainOptions, model: Any, context: JobContext) -> Any:
    """A whole model with what the ranks have learnt, on the first; elsewhere the shared one."""
    state = gather_state(model)
    if not is_first_rank():
        return model
    whole, _ = _open(options, context, "cpu")
    whole.load_state_dict(state)
    return whole
