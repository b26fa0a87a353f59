"""A smaller checkpoint from a larger one, disk to disk: planned, sliced, rewritten and checked."""
