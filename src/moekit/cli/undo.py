"""`moekit undo`: back to the parent checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli._command import build_command
from moekit.cli._terminal import Terminal


def undo(
    terminal: Terminal,
    folder: Annotated[Path, typer.Argument(help="checkpoint that moekit wrote", show_default=False)],
    keep: Annotated[
        Path | None, typer.Option(help="where the changed checkpoint goes (default: FOLDER.undone)")
    ] = None,
) -> None:
    """Put the parent that the record names in FOLDER's place, once its fingerprint proves that it is the same.

    The changed checkpoint is kept beside it.
    """
    from moekit.jobs.estimates import Item, JobEstimate
    from moekit.jobs.undo import find_parent, undo as undo_change

    target = keep or folder.with_name(f"{folder.name}.undone")
    found = find_parent(folder)
    if terminal.dry_run:
        writes = (Item(str(folder), found.nbytes), Item(str(target)))
        terminal.estimate(JobEstimate((Item(str(found.parent), found.nbytes),), writes, disk=found.nbytes, memory=0))
        return
    undo_change(folder, keep=target)
    terminal.answer(folder=str(folder), parent=str(found.parent), undone=found.command, kept=str(target))
    terminal.say(f"undone: {found.command}")
    terminal.say(f"{folder} is {found.parent} again; what it was is in {target}")


def build() -> Any:
    """The command."""
    return build_command(undo, examples=["moekit undo ./routed"])
