"""`moekit.training.train`: one call, repeatable by its seed, continued after a kill as if nothing had happened."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from moekit._memory import naming_memory
from moekit._progress import Progress
from moekit.checkpoint.atomic import lock
from moekit.checkpoint.stored import mark_stored
from moekit.data import vocabulary
from moekit.data.forcing import refuse_reader
from moekit.errors import BadConfig, UnsupportedModel
from moekit.experts.factored_model import finish
from moekit.runtime.slots import learns
from moekit.training.config import TrainConfig, TrainResult
from moekit.training.distribution import Distribution
from moekit.training.identity import prepare_folder, run_identity
from moekit.training.layers import remembered_layers
from moekit.training.memory import check_memory
from moekit.training.observed import answers_all, needs_logits, refuse_without_logits
from moekit.training.session import Session
from moekit.training.teacher import Teacher
from moekit.training.texts import MAIN, Text, Texts, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@naming_memory("training", "take a smaller batch or shorter rows, or a machine with more memory")
def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Text | Mapping[str, Text],
    config: TrainConfig,
    *,
    output: str | Path | None = None,
    heldout: Text | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    distribution: Distribution | None = None,
    teacher: Teacher | None = None,
    adapter: str | Path | None = None,
) -> TrainResult:
    """Train a model in place.

    The batches depend on the text, the seed and the sizes alone, so two models trained with one config see the same.
    With an `output` folder the run leaves checkpoints there; called again after a kill, it continues from the last
    complete one, and its losses are those of the unbroken run (bit for bit on a CPU with as many threads). Called again
    after it ended, it reads what it learnt.

    Args:
        model: a MoE model in fp32, with or without a routing policy; trained where it is (CPU or GPU).
        tokenizer: its tokenizer; None if the text is tokenized already.
        documents: text to train on, or its rows; or several texts by name ("train", "retain", ...), which objectives
            read by their setting `text`.
        config: the run's knobs.
        output: folder for checkpoints, `run.json` and `train.json`; None keeps nothing.
        heldout: text whose loss is taken every `eval_every` steps and at the end.
        resume: continue what is in `output`; False removes it and starts afresh.
        progress: told of each step.
        distribution: how the model lies on ranks, if they share it (`moekit.parallel.data_parallel`); the same on each.
        teacher: what the objective `kd` holds the output against (`LiveTeacher`, `StoredTeacher`).
        adapter: folder in which the adapter is kept for peft before it is merged; `config.lora` only.

    Returns:
        Losses, tokens, seconds and routing figures.

    Raises:
        BadConfig: the model or the tokenizer does not fit, or `output` holds another run.
        UnsupportedModel: a dense model, or something asked for needs router logits that it does not give.
        BadData: the text is empty.
        NumericFault: the loss, a router's logits or the weights became NaN or infinite.
        OutOfBudget: memory cannot suffice, or did not.
    """
    result = _train(
        model,
        tokenizer,
        documents if isinstance(documents, Mapping) else {MAIN: documents},
        config,
        output=None if output is None else Path(output),
        heldout=heldout,
        resume=resume,
        progress=progress,
        distribution=distribution,
        teacher=teacher,
        adapter=None if adapter is None else Path(adapter),
    )
    return _packed(model, result)


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Mapping[str, Text],
    config: TrainConfig,
    *,
    output: Path | None,
    heldout: Text | None,
    resume: bool,
    progress: Progress | None,
    distribution: Distribution | None,
    teacher: Teacher | None,
    adapter: Path | None,
) -> TrainResult:
    """`train`, its arguments in one form."""
    if adapter is not None and config.lora is None:
        raise BadConfig("an adapter is to be kept, but none trains", hint="give lora, as in lora=LoraSettings()")
    _check_loss(model)
    terms = config.terms()
    with remembered_layers(model, None if distribution is None else distribution.layers):
        refuse_without_logits(model, needs_logits(terms, config.balancer is not None, config.schedules))
    refuse_reader(model.config, "it is not trained by the next token of a text")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = {name: read_rows(model, tokenizer, text, config, progress) for name, text in documents.items()}
    held = None if heldout is None else read_rows(model, tokenizer, heldout, config, progress)
    texts = Texts(rows, terms.texts, config, world)
    check_memory(model, config, texts.steps, world)
    terms.check_teacher(None if teacher is None else teacher.complete)
    if teacher is not None:
        for name in terms.taught_texts:
            teacher.check(texts.rows[name], vocabulary.output_size(model))
    identity = run_identity(model, texts, config, world, distribution, teacher)
    if distribution is not None and config.lora is not None:
        raise BadConfig("adapters cannot train while ranks share the experts", hint="train parts, or on one rank")
    if distribution is not None and learns(model):
        raise BadConfig(
            "what runtime parts learn cannot be kept while ranks share the experts", hint="train on one rank, or by DDP"
        )
    with ExitStack() as stack:
        # Every rank finds the same files; the first alone holds the lock.
        if output is not None and int(os.environ.get("RANK", "0")) == 0:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(output))
            prepare_folder(output, identity, resume)
        if distribution is not None and distribution.layers is not None:
            stack.enter_context(remembered_layers(model, distribution.layers))
        stack.enter_context(_as_it_was(model))
        mark_stored(model, None)  # small steps would be lost in the rounding of what it was stored in
        run = Session(model, config, terms, texts, distribution, teacher, adapter)
        stack.enter_context(run.prepared())
        if output is None:  # Trainer wants a folder all the same
            return run.execute(Path(stack.enter_context(TemporaryDirectory())), held, keep=False, progress=progress)
        run.meet(output)
        return run.finished(output) or run.execute(output, held, keep=True, progress=progress)


def _packed(model: PreTrainedModel, result: TrainResult) -> TrainResult:
    """What a run did, once residuals of factored experts have lost the rows that it zeroed."""
    counted = finish(model)
    return result if counted is None else result.model_copy(update={"notes": [*result.notes, str(counted)]})


def _check_loss(model: PreTrainedModel) -> None:
    """Refuse a model that cannot say what it loses on a text.

    Raises:
        UnsupportedModel: it computes no loss, or that of a second text.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(model).__name__} reads one text and writes another: training knows texts, not pairs of them",
            hint="train it with transformers' Seq2SeqTrainer, and give moekit the folder",
        )
    if "labels" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(
            f"{type(model).__name__} computes no loss of a text: its forward takes no labels",
            hint="it is trained otherwise than by the next token; moekit check, estimate and reshard work on it",
        )


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Give back mode, `requires_grad` and config when a run is over."""
    config = model.config.get_text_config()
    cached = getattr(model.config, "use_cache", None)  # transformers' Trainer switches it off for good
    mode, flags = model.training, [(p, p.requires_grad) for p in model.parameters()]
    own_loss = getattr(config, "output_router_logits", None)
    if own_loss and answers_all(model):
        # transformers' balance loss pools layers and re-derives the choice; ours replaces it where it can be had.
        config.output_router_logits = False
    try:
        yield
    finally:
        model.train(mode)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        if own_loss:
            config.output_router_logits = own_loss
        if cached is not None:
            model.config.use_cache = cached
