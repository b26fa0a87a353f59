"""Checkpoints of several ranks, which any number of ranks opens."""
