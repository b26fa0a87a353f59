"""Comparisons side by side: dispatchers and pruning methods, ours and others."""
