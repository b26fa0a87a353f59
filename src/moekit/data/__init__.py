"""Text, batches and questions: local files, hub ids, and packages that carry text or a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
