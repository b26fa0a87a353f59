"""`moekit apply` prints what `moekit prune` prints."""

from moekit.cli.views.prune import show

__all__ = ["show"]
