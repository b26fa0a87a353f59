"""Settings that move during a run: one file a schedule, entered into the catalogue as kind "schedule"."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(__name__, {"Schedule": "base", "read_schedule": "base"})
