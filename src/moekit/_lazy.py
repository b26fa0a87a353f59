"""Lazy package attributes (PEP 562), so that `import moekit` loads neither torch nor transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` for a package.

    Args:
        package: the package's `__name__`.
        names: public name -> module that defines it, relative to the package ("" for sub-modules themselves), or by its
            full name ("moekit. ...") where the package hands on what another one defines.

    Returns:
        The two functions, to be assigned to `__getattr__` and `__dir__`.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = names[name] or name
        module = importlib.import_module(home if home.startswith("moekit.") else f"{package}.{home}")
        return getattr(module, name) if names[name] else module

    def __dir__() -> list[str]:
        return sorted(names)

    return __getattr__, __dir__
