"""In a straight line."""

from __future__ import annotations

from moekit.catalogue import register
from moekit.training.schedules.base import KIND, Ramp


@register(name="linear", kind=KIND, changes="runtime")
class Linear(Ramp):
    """In a straight line from one value to another.

    SMoE-Dropout grows `routing.top_k` so; a weight that is to fade in or out needs no more.
    """
