"""Dense to MoE: copy the feed-forward network, cut it into experts, or add experts beside it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
