"""Placement solvers, one file each."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Contiguous": "contiguous",
        "Exact": "exact",
        "Greedy": "greedy",
        "Random": "random",
        "Swap": "swap",
    },
)
