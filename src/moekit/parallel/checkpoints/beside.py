"""What a sharded checkpoint carries beside its weights, so that a plain folder can be made of it alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.record import RECORD_FILE, TENSORS_FILE, Record
from moekit.runtime.saved import entries


def write_beside(model: Any, tokenizer: Any, record: Record | None, folder: Path) -> tuple[str, ...]:
    """Write what a plain folder needs besides weights; names of the files."""
    before = {path.name for path in folder.iterdir()}
    config = copy.deepcopy(getattr(model, "config", None))
    if config is not None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        config.dtype = dtype
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    beside = tuple(sorted({path.name for path in folder.iterdir() if path.is_file()} - before))
    parts, tensors = entries(model)
    kept = (record or Record(command="moekit.parallel.save_sharded")).model_copy(update={"parts": parts})
    if tensors:
        save_file(tensors, folder / TENSORS_FILE)
    # Not Record.write: until the weights are whole there is nothing for it to prove.
    atomic_write(folder / RECORD_FILE, kept.model_dump_json(indent=1) + "\n")
    return beside
