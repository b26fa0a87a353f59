"""Every Mixture-of-Experts family of the installed transformers: found, and built tiny, by rules instead of a list."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
