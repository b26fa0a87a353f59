"""What a folder of expert sets is made from: the text of each task, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekit.data import Document, TokenizedDocument, load_text
from moekit.data.encoding import Bos
from moekit.data.shares import take_shares
from moekit.data.sources import text_mixes
from moekit.errors import BadData
from moekit.jobs.estimates import ByteSizes
from moekit.jobs.shared.hashes import local_parts
from moekit.serving.expert_sets.expert_set import GENERALIST, ExpertSet
from moekit.trace.meta import DataEntry

# Task -> its documents.
Texts = dict[str, list[TokenizedDocument]]

logger = logging.getLogger(__name__)

# Text up to this size is read for a dry run, which must know how many domains it has.
_COUNTED_BYTES = 64 << 20


def texts_of_tasks(
    documents: Sequence[Document],
    reference: str,
    task: str | None,
    tokenizer: Any,
    max_tokens: int | None,
    bos: Bos = "auto",
) -> Texts:
    """The documents of each task, tokenized.

    Args:
        documents: of all tasks.
        reference: where they come from.
        task: the one task they are of; None makes each domain a task.
        tokenizer: of the model.
        max_tokens: of each task, at most, shared among its documents.
        bos: see `moekit.data.encoding.beginning`.

    Raises:
        BadData: a task of fewer than two tokens, or a domain of the generalist's name.
    """
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(task or document.domain, []).append(document)
    if GENERALIST in groups:
        raise BadData(
            f"a domain is called {GENERALIST!r}, which is the name of all tasks together",
            file=reference,
            hint="rename it, or name the task (--task)",
        )
    found: Texts = {}
    for name, group in groups.items():
        try:
            found[name] = take_shares(group, tokenizer, max_tokens, bos=bos)
        except BadData as error:
            raise BadData(f"task {name!r}: {error.message}", file=reference, hint=error.hint) from error
    return found


def log_warnings(expert_set: ExpertSet) -> None:
    """Say how much of the model a task's text did not show."""
    missed = [len(experts) for experts in expert_set.never_routed.values() if experts]
    if missed:
        logger.warning(
            "%s: %d experts in %d of %d layers were never routed in its text; they rank below all others",
            expert_set.task,
            sum(missed),
            len(missed),
            len(expert_set.origin.layers),
        )


def account(reference: str, text: list[TokenizedDocument]) -> list[DataEntry]:
    """Documents and tokens of a text, by domain."""
    path = Path(reference).expanduser()
    where = str(path.resolve()) if path.exists() else reference
    domains: dict[str, list[TokenizedDocument]] = {}
    for document in text:
        domains.setdefault(document.domain, []).append(document)
    return [
        DataEntry(
            source=where,
            domain=domain,
            documents=len(some),
            tokens=sum(len(d.ids) for d in some),
            begins=max((tuple(d.ids[: d.begins]) for d in some), key=len),
        )
        for domain, some in domains.items()
    ]


def tasks_of(reference: str, task: str | None, sizes: ByteSizes) -> int | None:
    """How many tasks a text is of; None where that is known only when it is read.

    Args:
        reference: the text.
        task: the one task that all of it is of; None makes each domain a task.
        sizes: bytes of what is here.
    """
    if task is not None:
        return 1
    if reference in (mixes := text_mixes()):
        return len(mixes[reference])
    nbytes = sizes.of(Path(reference).expanduser())
    if nbytes is None or nbytes > _COUNTED_BYTES or not local_parts(reference):
        return None
    return len({document.domain for document in load_text(reference)})
