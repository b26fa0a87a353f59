"""Tiny data and trainers for the training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from tests.families import VOCAB


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random token rows, the last positions of odd rows padded."""

    def __init__(self, count: int, length: int = 12, seed: int = 0, pad: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, VOCAB, (count, length), generator=generator)
        self.mask = torch.ones_like(self.ids)
        if pad:
            self.mask[1::2, length - 4 :] = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        labels = self.ids[row].masked_fill(self.mask[row] == 0, -100)
        return {"input_ids": self.ids[row], "attention_mask": self.mask[row], "labels": labels}


def trainer(model: PreTrainedModel, data: Rows, folder: Path, **kwargs: Any) -> Trainer:
    """A Trainer that runs in file order, logs every step and saves nothing."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    return Trainer(model, TrainingArguments(**settings | kwargs), train_dataset=data)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words "w3" to "w127"."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
