"""Measure models and compare them: perplexity, multiple choice through lm-eval, side by side with error bars."""

import lazy_loader

# No module may be called like a function exported here: importing it would put the module in the function's place.

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
