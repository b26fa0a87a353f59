"""Expert parallelism side by side: every dispatcher and every peer that is installed, over a link of a known rate."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
