"""Run a model one decoder layer at a time, straight from disk: memory of a few layers, whatever the model's size."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "LayerLoader": "loader",
        "States": "states",
        "Walk": "walk",
    },
)
