"""Parts that live in a model: what a router, its experts or its block do beside the stock code, and learn."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
