"""Read and write model folders: open, verify, stream, write atomically; refuse what is unsafe."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
