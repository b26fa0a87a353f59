"""Recipes: YAML steps, checked before they run, skipped when they are finished."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Recipe": "schema",
        "load_recipe": "schema",
        "RunResult": "runner",
        "forecast": "runner",
        "run": "runner",
    },
)
