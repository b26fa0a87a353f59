"""Routing policies: how a token chooses experts. One file per method; the slot they live in is `moekit.runtime`'s."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
