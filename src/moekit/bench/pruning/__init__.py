"""All pruning methods side by side on one model and text: `moekit bench prune`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
