"""Prove that a checkpoint is what its record says."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "CheckReport": "report",
        "Finding": "report",
        "check": "whole",
    },
)
