"""Find routers, experts and shared experts; permute them; turn a dense model into a MoE."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
