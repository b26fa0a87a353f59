"""Rules that move selection biases: one file a rule, entered into the catalogue as kind "balancer"."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
