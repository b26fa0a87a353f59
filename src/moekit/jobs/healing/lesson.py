"""The text of a healing: rows that the student learns from, and documents kept apart to prove the result on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moekit.data import Document, TokenBatches, load_split, load_text, pack
from moekit.data.batches import arrange, pad_id_of
from moekit.data.passages import units
from moekit.data.shares import take_shares
from moekit.errors import BadData
from moekit.jobs.context import JobContext
from moekit.jobs.healing.sources import Sources
from moekit.jobs.options.heal import HealOptions
from moekit.training import TrainConfig
from moekit.training.healing import HealConfig

# Longest context of the proof where the model allows more.
_WINDOW = 1024
_WAY_OUT = "give longer documents, another text with --heldout, or say --no-proof"


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Text that nothing was learnt from.

    Attributes:
        source: where it came from.
        rows: one document to a row, longer ones in several.
        window: positions of a row.
    """

    source: str
    rows: TokenBatches
    window: int


@dataclass(frozen=True, eq=False)
class Lesson:
    """What is learnt from, and how.

    Attributes:
        rows: of the text.
        config: of the run.
        heldout: text to prove on; None without a proof.
        tokenizer: of both models.
    """

    rows: TokenBatches
    config: TrainConfig
    heldout: HeldOut | None
    tokenizer: Any


def read_lesson(options: HealOptions, settings: HealConfig, sources: Sources, context: JobContext) -> Lesson:
    """Read both texts before any work, as either may turn out empty.

    Raises:
        BadConfig: the models have different tokenizers.
        BadData: a text is not there, empty, or too short.
    """
    documents, apart, source = _read(options, context)
    longest = min(sources.longest(checkpoint) for checkpoint in (sources.student, sources.teacher))
    settings = settings.model_copy(update={"seq_len": min(settings.seq_len, longest)})
    tokenizer = sources.tokenizer([*documents, *apart], options.bos)
    config = settings.train_config(options.what, seed=context.seed, bos=options.bos)
    rows = pack(
        documents,
        tokenizer,
        config.seq_len,
        pad=config.pad,
        end_token=config.end_token,
        bos=options.bos,
        progress=context.progress,
    )
    config = settings.train_config(options.what, seed=context.seed, bos=options.bos, rows=len(rows))
    window = options.window or min(_WINDOW, longest)
    heldout = _heldout(options, apart, source, window, tokenizer) if options.proof else None
    return Lesson(rows, config, heldout, tokenizer)


def _read(options: HealOptions, context: JobContext) -> tuple[list[Document], list[Document], str]:
    """Documents to learn from, those to prove on, and what the latter are called."""
    if not options.proof:
        return load_text(options.data, progress=context.progress), [], ""
    if options.heldout is None:
        return (*load_split(options.data, progress=context.progress), f"{options.data}[heldout]")
    learnt = load_text(options.data, progress=context.progress)
    return learnt, load_text(options.heldout, progress=context.progress), options.heldout


def _heldout(options: HealOptions, documents: list[Document], source: str, window: int, tokenizer: Any) -> HeldOut:
    try:
        taken = take_shares(units(documents), tokenizer, options.proof_tokens, bos=options.bos)
    except BadData:  # fewer than two tokens in all
        taken = []
    if not any(len(document.ids) > 1 for document in taken):
        raise BadData("no document of the text for the proof has two tokens", file=source, hint=_WAY_OUT)
    return HeldOut(source, arrange(taken, window, pad=True, pad_id=pad_id_of(tokenizer)), window)
