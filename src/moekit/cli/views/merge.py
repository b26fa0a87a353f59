"""`moekit merge`: fold experts into fewer, and prove what that costs."""

from moekit.cli.views.prune import show

__all__ = ["show"]
