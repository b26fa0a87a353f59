"""All pruning methods side by side on one model and text: `moekit bench prune`."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Entry": "setting",
        "PruneBenchResult": "result",
        "PruneRun": "result",
        "RankRow": "result",
        "Ranking": "result",
        "Setting": "setting",
        "Subject": "calibration",
        "bench_pruning": "bench",
        "default_entries": "setting",
        "rank": "ranking",
        "take_tokens": "text",
    },
)
