"""Losses, callbacks, freezing, adapters and exact resume for transformers' Trainer; a tiny model from scratch."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "CompleteCheckpoints": "resume",
        "ExactResume": "resume",
        "FreezeReport": "freeze",
        "TinyConfig": "pretrain_tiny",
        "TinyResult": "pretrain_tiny",
        "LiveTeacher": "teacher",
        "LoraSettings": "lora",
        "MoECallback": "callback",
        "RoutingFigures": "figures",
        "StoredTeacher": "teacher_store",
        "TrainConfig": "config",
        "TrainResult": "config",
        "add_lora": "lora",
        "build_tiny_model": "pretrain_tiny",
        "collect": "collector",
        "last_complete_checkpoint": "resume",
        "merge_lora": "lora",
        "parts_of": "freeze",
        "store_teacher": "teacher_store",
        "train": "run",
        "train_tiny": "pretrain_tiny",
        "train_only": "freeze",
    },
)
