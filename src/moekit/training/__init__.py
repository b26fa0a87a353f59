"""Losses, callbacks, freezing, adapters and exact resume for transformers' Trainer; a lab model from scratch."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "CompleteCheckpoints": "resume",
        "ExactResume": "resume",
        "FreezeReport": "freeze",
        "LabConfig": "lab",
        "LabResult": "lab",
        "LoraSettings": "lora",
        "MoECallback": "callback",
        "RoutingFigures": "figures",
        "TrainConfig": "config",
        "TrainResult": "config",
        "add_lora": "lora",
        "build_lab_model": "lab",
        "collect": "collector",
        "last_complete_checkpoint": "resume",
        "merge_lora": "lora",
        "parts_of": "freeze",
        "train": "run",
        "train_lab": "lab",
        "train_only": "freeze",
        "train_tokenizer": "vocabulary",
    },
)
