"""Reports: one self-contained HTML page, and the same numbers as JSON."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
