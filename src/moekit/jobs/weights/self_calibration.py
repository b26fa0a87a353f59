"""Text to decide on as a model is served: prompts, each followed by the model's own answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moekit
from moekit._files import read_text
from moekit._progress import Progress
from moekit.compress.self_calibration import answer_tokens, demonstrations, prompt_ids
from moekit.data import Document, TokenBatches, TokenizedDocument
from moekit.data.batches import arrange, pad_id_of
from moekit.errors import BadConfig
from moekit.jobs.shared.opened import OpenedModel

logger = logging.getLogger(__name__)

FILE = "answers.json"


def answered_rows(
    documents: list[Document],
    source: OpenedModel,
    scratch: Path,
    *,
    new_tokens: int,
    each: int,
    seed: int,
    load: Callable[[], Any],
    progress: Progress | None = None,
) -> TokenBatches:
    """Let the model answer some documents of each domain, and lay each prompt with its answer out in a row of its own.

    Args:
        documents: prompts.
        source: whose tokenizer asks, and whose positions bound prompt and answer together.
        scratch: where answers are kept for a run that goes on.
        new_tokens: longest answer.
        each: prompts of each domain, the longest that fit.
        seed: of what is drawn.
        load: opens the whole model, if answers are still wanted.
        progress: told prompt by prompt.

    Raises:
        BadConfig: no prompt leaves room for an answer.
        BadData: an empty prompt.
    """
    file = scratch / FILE
    found = _read(file)
    tokenizer = source.tokenizer()
    if found is None:
        prompts = _fitting(documents, tokenizer, source.longest - new_tokens, each, seed)
        model = load()
        found = answer_tokens(model, tokenizer, prompts, max_new_tokens=new_tokens, progress=progress)
        _write(file, found)
    # In gapless rows answers would follow other prompts, and be cut off from their own.
    return arrange(found, max(len(answered.ids) for answered in found), pad=True, pad_id=pad_id_of(tokenizer))


def load_for_answers(source: OpenedModel, device: str, dtype: str) -> Any:
    """The whole model, with its routing policy if it has one."""
    return moekit.load(source.location, device=device, dtype=dtype).eval()


def _fitting(documents: list[Document], tokenizer: Any, room: int, each: int, seed: int) -> list[Document]:
    fitting = [document for document in documents if len(prompt_ids(tokenizer, document.text)) <= room]
    if not fitting:
        raise BadConfig(
            f"none of {len(documents)} documents leaves room for its answer: prompts may have {max(0, room)} tokens",
            hint="give shorter prompts, or ask for shorter answers (--self-generated)",
        )
    if len(fitting) < len(documents):
        logger.warning("%d of %d prompts are too long to be answered", len(documents) - len(fitting), len(documents))
    return demonstrations(fitting, each, seed=seed)


def _read(file: Path) -> list[TokenizedDocument] | None:
    try:
        entries = json.loads(read_text(file))
        return [TokenizedDocument(list(map(int, e["ids"])), str(e["domain"]), int(e["index"])) for e in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: Path, answered: list[TokenizedDocument]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = [{"ids": list(a.ids), "domain": a.domain, "index": a.index} for a in answered]
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(entries), encoding="utf-8")
    partial.replace(file)
