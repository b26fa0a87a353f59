"""Recipes: YAML steps, checked before they run, skipped when they are finished."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
