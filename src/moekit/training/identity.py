"""What makes a training run this run, so that a folder never continues another one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moekit._files import read_text
from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.fingerprint import live_fingerprint
from moekit.errors import BadConfig
from moekit.runtime.saved import parts_digest
from moekit.training.compute import resolve_precision
from moekit.training.config import TrainConfig
from moekit.training.distribution import Distribution
from moekit.training.resume import STATE_FILE, checkpoints, remove_incomplete
from moekit.training.teacher import Teacher
from moekit.training.texts import Texts

logger = logging.getLogger(__name__)

RUN_FILE, RESULT_FILE = "run.json", "train.json"
# Settings that change how a run is watched, not what it computes: a run may resume with others.
_WATCHING = {"save_every", "eval_every"}


def run_identity(
    model: PreTrainedModel,
    texts: Texts,
    config: TrainConfig,
    world: int = 1,
    distribution: Distribution | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """What makes a run this run: model, routing policy, text, settings, processes. Equal identities may resume.

    Where ranks share a model, another number of them may continue it, if each step keeps its rows.
    """
    routing = parts_digest(model) or "stock"
    precision = resolve_precision(config.precision, model.device)  # "auto" may mean something else elsewhere
    settings = config.model_copy(update={"precision": precision})
    taught = {} if teacher is None else {"teacher": teacher.identity}
    if distribution is not None:
        return {
            "routing": routing,
            "text": texts.digest,
            "settings": settings.model_dump_json(exclude=_WATCHING | {"batch", "accumulation"}),
            "steps": texts.steps,
            "rows of a step": config.batch * config.accumulation * world,
            **distribution.identity(),
            **taught,
        }
    return {
        **taught,
        "model": live_fingerprint(model),
        "routing": routing,
        "text": texts.digest,
        "settings": settings.model_dump_json(exclude=_WATCHING),
        "steps": texts.steps,
        "processes": world,
    }


def prepare_folder(output: Path, identity: dict[str, Any], resume: bool) -> None:
    """Make sure that what lies in a folder is this run's, or nothing.

    Args:
        output: the run's folder.
        identity: from `run_identity`.
        resume: False removes what a run has left there.

    Raises:
        BadConfig: the folder holds another run.
    """
    known = output / RUN_FILE
    if not resume:
        for _, path in checkpoints(output):
            shutil.rmtree(path)
        for name in (RUN_FILE, RESULT_FILE, STATE_FILE):
            (output / name).unlink(missing_ok=True)
    elif known.exists():
        try:
            before = json.loads(read_text(known))
        except ValueError:
            before = {}
        other = [key for key, value in identity.items() if before.get(key) != value]
        if other:
            raise BadConfig(
                f"holds another run: {', '.join(other)} differ",
                file=output,
                hint="choose another output folder, or start afresh (resume=False)",
            )
    for path in remove_incomplete(output):
        logger.warning("%s was left half-written by a killed run; removed", path)
    atomic_write(known, json.dumps(identity, indent=1))
