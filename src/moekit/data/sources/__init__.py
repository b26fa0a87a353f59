"""Sources of text, questions and a model: packages that carry them, fetched by name into the cache.

Each module here defines `SOURCES`; adding a source is one file.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moekit._names import near
from moekit._progress import Progress
from moekit.data.sources.base import Source, SourceInfo
from moekit.errors import BadData

if TYPE_CHECKING:
    from moekit.data.sources.smollm2 import PackagedModel

__all__ = ["SourceInfo", "all_sources", "available", "fetch", "get_source"]


@cache
def all_sources() -> dict[str, Source | PackagedModel]:
    """Every source by name."""
    found: dict[str, Source | PackagedModel] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for source in getattr(importlib.import_module(f"{__name__}.{module.name}"), "SOURCES", ()):
            if source.name in found:
                raise BadData(f"two sources are called {source.name!r}")
            found[source.name] = source
    return found


def get_source(name: str) -> Source | PackagedModel:
    """Look a source up.

    Raises:
        BadData: no such source; names near matches.
    """
    sources = all_sources()
    if name in sources:
        return sources[name]
    raise BadData(f"no source is called {name!r}", hint=near(name, sorted(sources)))


def available() -> list[SourceInfo]:
    """All sources, with whether they can be had here and whether they are in the cache; nothing is downloaded."""
    return [source.info() for _, source in sorted(all_sources().items())]


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Make sure that a source is in the cache ($MOEKIT_HOME or ~/.cache/moekit).

    Args:
        name: a name from `available()`; "smollm2" is the demo's dense model.
        progress: told what is being fetched.

    Returns:
        Its folder: documents for text and questions, a Hugging Face model folder for a model.

    Raises:
        BadData: unknown name, client missing, offline, or a digest that does not fit.
    """
    return get_source(name).fetch(progress)
