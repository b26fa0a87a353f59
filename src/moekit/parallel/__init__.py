"""Experts on several ranks: dispatchers, placements applied, checkpoints that any number of ranks opens."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Departure": "pulse",
        "Dispatcher": "dispatcher",
        "ExpertLayout": "layout",
        "ExpertShard": "sharding",
        "RankGone": "health",
        "Ranks": "ranks",
        "StartedRanks": "start",
        "Traffic": "traffic",
        "agree": "agreement",
        "expert_mesh": "ranks",
        "expert_parallel": "sharding",
        "expert_parameters": "sharding",
        "gather_experts": "sharding",
        "load_sharded": "sharded",
        "make_dispatcher": "sharding",
        "save_sharded": "sharded",
        "shards": "sharding",
        "start_ranks": "start",
    },
)
