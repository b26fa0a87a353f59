"""Experts on several ranks: dispatchers, placements applied, checkpoints that any number of ranks opens."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Departure": "launch.beats",
        "Dispatcher": "dispatcher",
        "ExpertLayout": "layout",
        "ExpertShard": "sharding",
        "RankGone": "launch.health",
        "Ranks": "ranks",
        "StartedRanks": "launch.start",
        "Traffic": "traffic",
        "agree": "launch.start",
        "expert_mesh": "ranks",
        "expert_parallel": "sharding",
        "expert_parameters": "sharding",
        "gather_experts": "sharding",
        "load_sharded": "checkpoints.sharded",
        "make_dispatcher": "sharding",
        "save_sharded": "checkpoints.sharded",
        "shards": "sharding",
        "start_ranks": "launch.start",
    },
)
