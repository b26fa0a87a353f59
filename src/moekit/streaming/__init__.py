"""Run a model one decoder layer at a time, straight from disk: memory of a few layers, whatever the model's size."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
