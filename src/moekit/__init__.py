"""Sparse Mixture-of-Experts language models, cheaper to train, move, store and serve, with proof of every cost."""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
