"""Ways to bring tokens and experts together, one file each."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "AllGather": "all_gather",
        "AllReduce": "all_reduce",
        "Hierarchical": "hierarchical",
        "OncePerExpert": "once_per_expert",
        "OncePerRank": "once_per_rank",
    },
)
