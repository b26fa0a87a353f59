"""One thing that was tried, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedModel

from moekit.errors import MoekitError
from moekit.jobs.shared.rehearsal import UNDER_WAY

State = Literal["yes", "refused", "failed", "untried"]
Found = TypeVar("Found")


class Cell(BaseModel):
    """What became of one thing.

    Attributes:
        state: "yes": it works. "refused": moekit says that it does not do this. "failed": it broke off, or the result
            is wrong. "untried": it needs what did not work.
        message: what was said, with the way out; "" for "yes".
        when: for "refused" and "failed": whether a model had run by then.
        seconds: it took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: State
    message: str = ""
    when: Literal["", "before work", "after work"] = ""
    seconds: float = 0.0


UNTRIED = Cell(state="untried")


class WrongResult(Exception):
    """A command came to its end, and what it made is not right."""


def attempt(function: Callable[[], Found], *, unseen: str = "") -> tuple[Cell, Found | None]:
    """Call a function, and say what became of it.

    Args:
        function: what is tried.
        unseen: name of a temporary folder, which messages are to leave out.

    Returns:
        What became of it, and what it returned; None where it did not.
    """
    start = time.monotonic()
    with _watched() as work:
        try:
            found = function()
        except MoekitError as error:
            told = "\n  -> ".join(filter(None, (_where(error) + error.message, error.hint)))
            return _ended("refused", told, work, start, unseen), None
        except Exception as error:  # whatever a family does to us is what we want to know
            told = str(error) if isinstance(error, WrongResult) else f"{type(error).__name__}: {error}"
            return _ended("failed", told, work, start, unseen), None
    return Cell(state="yes", seconds=_since(start)), found


def _where(error: MoekitError) -> str:
    return "" if error.layer is None else f"layer {error.layer}: "


def _ended(state: State, told: str, work: list[bool], start: float, unseen: str) -> Cell:
    message = (told.replace(f"{unseen}/", "") if unseen else told).strip()
    when: Literal["before work", "after work"] = "after work" if work else "before work"
    return Cell(state=state, message=message, when=when, seconds=_since(start))


def _since(start: float) -> float:
    return round(time.monotonic() - start, 2)


@contextmanager
def _watched() -> Iterator[list[bool]]:
    """A list that is empty until a model runs; questions to single routers and rehearsals are no work."""
    work: list[bool] = []

    def look(module: nn.Module, args: Any) -> None:
        unreal = torch.get_default_device().type == "meta" or UNDER_WAY.get()
        if isinstance(module, PreTrainedModel) and not unreal:
            work.append(True)

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield work
    finally:
        handle.remove()
