"""Text that a job decides on, and text that it proves on: read once and told apart before any work.

Where one text serves for both, a tenth of it is kept apart for the proof (`moekit.data.split`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Protocol

from moekit._progress import Progress
from moekit.compress.engine.plan import WeightPlan
from moekit.data import Document, load_split, load_text
from moekit.data.encoding import Bos
from moekit.data.passages import units
from moekit.data.shares import take_shares
from moekit.errors import BadConfig, BadData, MoekitError
from moekit.jobs.shared.hashes import text_hash
from moekit.jobs.shared.opened import OpenedModel
from moekit.jobs.weights.proof import HeldOut
from moekit.trace.meta import DataEntry

logger = logging.getLogger(__name__)

# How the account of a text tells that a part of it was kept apart.
_TRAINED = re.compile(r"(.+)\[train\]")
_TOO_SHORT = "no document has two tokens in the tenth that is kept apart for the proof"


# How the text to decide on is laid out.
TEXT_FIELDS = ("max_tokens", "seq_len", "batch_size")


class ProofOptions(Protocol):
    """Options of every job that proves on text."""

    @property
    def heldout(self) -> str | None:
        """Text to prove on."""

    @property
    def proof_tokens(self) -> int | None:
        """At most, an equal share of each domain; None for all."""

    @property
    def window(self) -> int | None:
        """Longest context in tokens; None for the model's, at most 1024."""

    @property
    def bos(self) -> Bos:
        """See `moekit.data.encoding.beginning`."""


class TextOptions(ProofOptions, Protocol):
    """Options of jobs that decide on text, too."""

    @property
    def data(self) -> str | None:
        """Text to decide on."""

    def given(self, *names: str) -> list[str]:
        """Those of some fields that are not as by default."""


def refuse_unread(options: TextOptions) -> None:
    """Refuse to lay out a text that nothing reads.

    Raises:
        BadConfig: naming the options.
    """
    if options.data is None and (given := options.given(*TEXT_FIELDS)):
        raise BadConfig(f"{', '.join(given)} given, but no text to decide on", hint="give --data, or leave that out")


def read_texts(
    options: TextOptions, source: OpenedModel, progress: Progress | None, *, apart: bool, proves: bool
) -> tuple[list[Document], HeldOut | None]:
    """Documents to decide on, and text to prove on; both before any work, as either may turn out empty.

    Args:
        options: the text to decide on, none where there is none, and maybe another one to prove on.
        source: whose tokenizer is used.
        progress: told of downloads.
        apart: whether a tenth of the text to decide on is kept apart.
        proves: whether there is a proof.

    Raises:
        BadData: a text is not there, empty, or too short.
    """
    data = options.data
    if data is None:
        return [], read_heldout(options.heldout, options, source, progress) if proves and options.heldout else None
    if not proves:
        # Nothing is asked of the other part: a text too small to be parted will do.
        return load_text(data, split="train" if apart else None, progress=progress), None
    if apart:
        documents, rest = load_split(data, progress=progress)
    else:
        documents, rest = load_text(data, progress=progress), []
    if options.heldout is not None:
        return documents, read_heldout(options.heldout, options, source, progress)
    return documents, _tokenized(data, rest, f"{data}[heldout]", options, source)


def read_heldout(reference: str, options: ProofOptions, source: OpenedModel, progress: Progress | None) -> HeldOut:
    """A text of its own to prove on.

    Raises:
        BadData: it is not there, empty, or no document has two tokens.
    """
    return _tokenized(reference, load_text(reference, progress=progress), reference, options, source)


def heldout_of_plan(
    plan: WeightPlan, options: ProofOptions, source: OpenedModel, progress: Progress | None
) -> HeldOut | None:
    """Text to prove a stored plan on: the one given, else what was kept apart when it was made; None where nothing was.

    Raises:
        BadConfig: the plan's text has changed since, so that what was kept apart is not known any more.
        BadData: the text that was given is not there, empty, or too short.
    """
    if options.heldout is not None:
        return read_heldout(options.heldout, options, source, progress)
    text = plan.file.kept_apart
    if text:
        check_unchanged(text, plan.file.text_sha256, "give --heldout TEXT, or say --no-proof")
        try:
            _, rest = load_split(text, progress=progress)
            return _tokenized(text, rest, f"{text}[heldout]", options, source)
        except MoekitError as error:
            logger.warning("the text of the plan cannot be read again: %s", error.message)
    logger.warning("there is no text to prove the result on, so nothing says what it costs: give --heldout TEXT")
    return None


def kept_apart(data: Sequence[DataEntry]) -> str:
    """The text of which a part was kept apart, by the account of what was decided on; "" where none was."""
    found = {match[1] for entry in data if (match := _TRAINED.fullmatch(entry.source))}
    return found.pop() if len(found) == 1 else ""


def _tokenized(
    reference: str, documents: list[Document], name: str, options: ProofOptions, source: OpenedModel
) -> HeldOut:
    try:
        tokenized = take_shares(units(documents), source.tokenizer(), options.proof_tokens, bos=options.bos)
    except BadData:  # fewer than two tokens in all
        tokenized = []
    if not any(len(document.ids) > 1 for document in tokenized):
        raise BadData(
            "no document of the text for the proof has two tokens" if name == reference else _TOO_SHORT,
            file=reference,
            hint="give longer documents, another text with --heldout, or say --no-proof",
        )
    return HeldOut(name, tokenized, options.window or min(1024, source.longest))


def check_unchanged(text: str, sha256: str, hint: str) -> None:
    """Refuse a text that is no longer what a plan was made on.

    Args:
        text: the text.
        sha256: of what it was; "" where that is not known.
        hint: the way out.

    Raises:
        BadConfig: it has changed.
    """
    now = text_hash(text)
    if now and sha256 and now != sha256:
        raise BadConfig("the text of this plan has changed since the plan was made", file=text, hint=hint)
