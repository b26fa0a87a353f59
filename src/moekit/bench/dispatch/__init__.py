"""Expert parallelism side by side: every dispatcher and every peer that is installed, over a link of a known rate."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "BenchResult": "result",
        "Setting": "setting",
        "run_bench": "harness",
        "two_nodes": "network",
    },
)
