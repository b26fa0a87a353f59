"""Page sections from results: traces, placements, evaluations, and C2R's curve of quality against rows."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
