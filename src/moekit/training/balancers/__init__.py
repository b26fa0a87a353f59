"""Rules that move selection biases: one file a rule, entered into the catalogue as kind "balancer"."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(__name__, {"Balancer": "base", "read_balancer": "base"})
