"""Sparse Mixture-of-Experts language models, cheaper to train, move, store and serve, with proof of every cost."""

from moekit._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__ = attach(
    __name__,
    {
        "apply": "jobs.apply",
        "convert": "jobs.convert",
        "evaluate": "jobs.evaluate",
        "expert_sets": "jobs.expert_sets",
        "load": "api",
        "place": "jobs.place",
        "pretrain_tiny": "jobs.pretrain_tiny",
        "profile": "jobs.profile",
        "prune": "jobs.prune",
        "route": "jobs.route",
        "save": "api",
        "sparsify": "jobs.sparsify",
        "super_experts": "jobs.super_experts",
        "train": "jobs.train",
        "write_data": "jobs.data",
        "write_report": "jobs.report",
    },
)
