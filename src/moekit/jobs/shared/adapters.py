"""The adapter of a run, kept beside the merged model in the layout that peft reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from moekit._files import read_text
from moekit._ranks import is_first_rank
from moekit.checkpoint.atomic import atomic_folder, check_apart
from moekit.errors import BadConfig
from moekit.jobs.context import JobContext
from moekit.jobs.shared.inputs import model_location

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapter(keep_adapter: str | None, *, learns: bool, hint: str) -> None:
    """Refuse to keep an adapter where none learns.

    Raises:
        BadConfig: with a hint.
    """
    if keep_adapter is not None and not learns:
        raise BadConfig("an adapter is to be kept, but none trains", hint=hint)


def settle_adapter(keep_adapter: str | None, out: Path) -> None:
    """Refuse a folder that the model itself is written to.

    Raises:
        BadConfig: names both.
    """
    if keep_adapter is not None:
        target = Path(keep_adapter).expanduser()
        check_apart(target, out)
        check_apart(out, target)


def adapter_scratch(keep_adapter: str | None, context: JobContext) -> Path | None:
    """Where training leaves the adapter; None where none is kept."""
    return None if keep_adapter is None else context.scratch / "adapter"


def place_adapter(keep_adapter: str | None, context: JobContext, parent: str) -> None:
    """Give what training left its own folder, whole or not at all, and name the model that it belongs to.

    Args:
        keep_adapter: the folder.
        context: of the job.
        parent: reference of the model that was trained.
    """
    source = adapter_scratch(keep_adapter, context)
    if keep_adapter is None or source is None or not is_first_rank():
        return
    location = Path(model_location(parent)).expanduser()
    told = json.loads(read_text(source / CONFIG))
    told["base_model_name_or_path"] = str(location.resolve()) if location.is_dir() else parent
    # What was there was refused before any work, unless an interrupted run of the same call left it.
    with atomic_folder(Path(keep_adapter).expanduser(), overwrite=True) as folder:
        shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
