"""Run a whole model, and tell its own faults from ours."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn

from moekit.errors import UnsupportedModel

# What code says that takes a thing for another one; faults of numbers, shapes and memory are told by those who ask.
_MISTAKES = (AttributeError, TypeError, NameError)
_LIBRARY, _TORCH = Path(transformers.__file__).parent, Path(torch.__file__).parent


@contextmanager
def telling_its_own_faults(model: nn.Module) -> Iterator[None]:
    """Within it a model may be run.

    Args:
        model: that is run; named where it breaks off.

    Raises:
        UnsupportedModel: this release of transformers breaks off in the model's own code, as it would without moekit.
    """
    try:
        yield
    except _MISTAKES as error:
        frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        where = next((file for file in reversed(frames) if not file.is_relative_to(_TORCH)), None)
        if where is None or not where.is_relative_to(_LIBRARY):
            raise
        raise UnsupportedModel(
            f"transformers {transformers.__version__} breaks off in its own {type(model).__name__} where it reads a "
            f"text: {type(error).__name__}: {error}",
            hint="a fault of that release: install another one",
        ) from error
