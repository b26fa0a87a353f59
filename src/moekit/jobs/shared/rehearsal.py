"""Whether the installed transformers runs a family at all, found on a tiny model of it before any work."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch

from moekit.errors import MoekitError
from moekit.runtime.answering import telling_its_own_faults

# Whether the model that runs is a tiny one, which is no work.
UNDER_WAY: ContextVar[bool] = ContextVar("rehearsal", default=False)

# Faults of numbers and shapes on a tiny model, and packages that it alone wants, say nothing of a large one.
_OF_THE_TINY = (
    *(RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError),
    *(AssertionError, ImportError),
)


def refuse_broken(config: Mapping[str, Any]) -> None:
    """Refuse a model of several parts whose class breaks off in the installed transformers where it reads a text.

    Layers alone would run, and the proof, which needs the whole model, would break off after all the work.

    Args:
        config: of the folder.

    Raises:
        UnsupportedModel: it breaks off; says in which release and how.
    """
    if isinstance(config.get("text_config"), dict) and isinstance(config.get("model_type"), str):
        # The numbers that are drawn for it are nobody else's: whoever asks first goes on as whoever asks again.
        with torch.random.fork_rng(devices=[]):
            error = _broken(config["model_type"])
        if error is not None:
            raise error


@functools.cache
def _broken(model_type: str) -> MoekitError | None:
    from moekit.checkpoint.several import run_as_part
    from moekit.family import build, family

    try:
        model = run_as_part(build(family(model_type)).eval())
    except (MoekitError, *_OF_THE_TINY):
        return None  # no tiny model of it: the work itself will tell
    token = UNDER_WAY.set(True)
    try:
        with torch.no_grad(), telling_its_own_faults(model):
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    except MoekitError as error:
        return error
    except _OF_THE_TINY:
        return None
    finally:
        UNDER_WAY.reset(token)
    return None
