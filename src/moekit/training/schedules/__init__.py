"""Settings that move during a run: one file a schedule, entered into the catalogue as kind "schedule"."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
