"""Named sources of text, questions and models: what packages add through the entry point group `moekit.sources`.

An entry point names a module with `SOURCES`, and perhaps `MIXES` and `QUESTION_MIXES`: names for several sources, each
place in a mix with candidates in order of preference. moekit itself has none: it reads files, folders and hub ids.
`moekit_demo`, which comes with it, has those of the demo.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from moekit._names import hint_for
from moekit._progress import Progress
from moekit.errors import BadConfig, BadData

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "moekit.sources"

Kind = Literal["text", "questions", "model"]
Mix = tuple[tuple[str, ...], ...]


class Piece(NamedTuple):
    """One document of a source: a stable name (its path in the package) and its plain text."""

    name: str
    text: str


def as_json(context: str, choices: list[str], answer: int, task: str) -> str:
    """A multiple-choice question as the text of a piece; `moekit.data.questions` reads it."""
    return json.dumps({"task": task, "context": context, "choices": choices, "answer": answer}, ensure_ascii=False)


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a source before it is fetched.

    Attributes:
        name: how the user calls it.
        kind: "text", "questions" or "model".
        domain: what its text is, as a short name.
        origin: where it comes from: client and package, or a place on this machine.
        licence: licence of the content.
        download_bytes: about how much is downloaded; 0 where nothing is.
        obtainable: whether the client or place is there (the network is not tried).
        cached: whether it has been fetched.
    """

    name: str
    kind: Kind
    domain: str
    origin: str
    licence: str
    download_bytes: int
    obtainable: bool
    cached: bool


class TextSource(Protocol):
    """What a named source of text, questions or a model can do."""

    @property
    def name(self) -> str:
        """How the user calls it."""

    @property
    def folder(self) -> Path:
        """Where it is kept once fetched."""

    def info(self) -> SourceInfo:
        """What is known of it before it is fetched."""

    def fetch(self, progress: Progress | None = None) -> Path:
        """Make sure that it is on this machine.

        Returns:
            Its folder.

        Raises:
            BadData: it cannot be had here.
        """

    def pieces(self, progress: Progress | None = None) -> Iterator[Piece]:
        """Its documents or questions, in a fixed order; a model has none.

        Raises:
            BadData: it cannot be had here, or is a model.
        """


@cache
def _modules() -> tuple[Any, ...]:
    """Modules of all packages that bring sources.

    Raises:
        BadConfig: one does not import.
    """
    found = []
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        try:
            found.append(point.load())
        except Exception as error:
            raise BadConfig(
                f"the sources {point.name!r} of the package {point.dist.name if point.dist else '?'} "
                f"do not import: {type(error).__name__}: {error}",
                hint=f"fix or uninstall it: it is registered in the group {ENTRY_POINT_GROUP!r}",
            ) from error
    return tuple(found)


@cache
def all_sources() -> Mapping[str, TextSource]:
    """Every source by name.

    Raises:
        BadData: two of one name.
    """
    found: dict[str, TextSource] = {}
    for module in _modules():
        for source in module.SOURCES:
            if source.name in found:
                raise BadData(f"two sources are called {source.name!r}", hint="uninstall one of the packages")
            found[source.name] = source
    return found


@cache
def text_mixes() -> Mapping[str, Mix]:
    """Mixes of texts by name."""
    return {name: mix for module in _modules() for name, mix in getattr(module, "MIXES", {}).items()}


@cache
def question_mixes() -> Mapping[str, Mix]:
    """Mixes of questions by name."""
    return {name: mix for module in _modules() for name, mix in getattr(module, "QUESTION_MIXES", {}).items()}


def get_source(name: str) -> TextSource:
    """Look a source up.

    Raises:
        BadData: no such source; names near matches.
    """
    sources = all_sources()
    if name in sources:
        return sources[name]
    raise BadData(f"no source is called {name!r}", hint=hint_for(name, sources))


def available() -> list[SourceInfo]:
    """All sources, with whether they can be had here and whether they are in the cache; nothing is downloaded."""
    return [source.info() for _, source in sorted(all_sources().items())]


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Make sure that a source is on this machine.

    Args:
        name: a name from `available()`; "smollm2" is the demo's dense model.
        progress: told what is being fetched.

    Returns:
        Its folder: documents for text and questions, a Hugging Face model folder for a model.

    Raises:
        BadData: unknown name, client missing, offline, or a digest that does not fit.
    """
    return get_source(name).fetch(progress)


def resolve_mix(name: str, progress: Progress | None = None) -> list[str]:
    """Fetch the sources of a mix, and say which were taken.

    Raises:
        BadData: for one place none of the sources can be had; names each reason.
    """
    chosen: list[str] = []
    for candidates in text_mixes()[name]:
        reasons: list[str] = []
        for candidate in candidates:
            try:
                get_source(candidate).fetch(progress)
            except BadData as error:
                logger.warning("%s: %s", candidate, error.message)
                reasons.append(f"{candidate}: {error.message}")
                continue
            chosen.append(candidate)
            break
        else:
            raise BadData(
                f"the mix {name!r} needs one of {', '.join(candidates)}: {'; '.join(reasons)}",
                hint="check the network, or give text of your own (data=FOLDER, each file or sub-folder a domain)",
            )
    return chosen
