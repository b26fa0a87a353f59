"""Sparse Mixture-of-Experts language models, cheaper to train, move, store and serve, with proof of every cost."""

from moekit._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__ = attach(
    __name__,
    {
        "load": "api",
        "save": "api",
    },
)
