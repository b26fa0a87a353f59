"""Experts on several ranks: dispatchers, placements applied, checkpoints that any number of ranks opens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
