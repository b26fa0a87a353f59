"""Losses, callbacks, freezing, adapters and exact resume for transformers' Trainer; a tiny model from scratch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
