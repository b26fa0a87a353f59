"""Public names: every one resolves, and none is hidden by a module of the same name."""

from __future__ import annotations

import importlib
import pkgutil
import types

import pytest

import moekit

PACKAGES = ["moekit"] + [m.name for m in pkgutil.walk_packages(moekit.__path__, "moekit.") if m.ispkg]
LAZY = [name for name in PACKAGES if "__getattr__" in vars(importlib.import_module(name))]


def test_the_layers_have_lazy_names() -> None:
    assert {"moekit", "moekit.checkpoint", "moekit.routing", "moekit.recipe"} <= set(LAZY)


@pytest.mark.parametrize("name", LAZY)
def test_every_exported_name_resolves_to_a_thing_and_not_to_a_module(name: str) -> None:
    package = importlib.import_module(name)
    for exported in dir(package):
        # Importing a sub-module puts it into its package under its own name, over a function that is called the same.
        assert not isinstance(getattr(package, exported), types.ModuleType), f"{name}.{exported}"
        assert not isinstance(getattr(package, exported), types.ModuleType), f"{name}.{exported}, asked again"
