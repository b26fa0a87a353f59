"""Recipes: YAML steps, checked before they run, skipped when they are finished."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Forecast": "plan",
        "Recipe": "schema",
        "load_recipe": "schema",
        "RunResult": "runner",
        "forecast": "runner",
        "run": "runner",
        "undo": "restore",
    },
)
