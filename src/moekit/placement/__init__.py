"""Which device holds which expert: cost model, topology, solvers, replay of a trace."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
