"""Losses, callbacks, freezing, adapters and exact resume for transformers' Trainer; a lab model from scratch."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "MoECallback": "callback",
        "collect": "collector",
        "RoutingFigures": "figures",
    },
)
