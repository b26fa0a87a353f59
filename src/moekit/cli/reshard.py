"""`moekit reshard`: a checkpoint that ranks saved, for other ranks or as a plain folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli._command import build_command
from moekit.cli._options import out_option
from moekit.cli._terminal import Terminal, size
from moekit.errors import BadConfig


def reshard(
    terminal: Terminal,
    folder: Annotated[Path, typer.Argument(help="checkpoint that ranks saved", show_default=False)],
    out: Annotated[Path, out_option("folder to write")],
    ep: Annotated[int | None, typer.Option(help="ranks that will share the experts: one file for each", min=1)] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="write one folder that stock transformers opens, without optimizer state")
    ] = False,
    placement: Annotated[
        Path | None, typer.Option(help="with --ep: rank of every expert, as moekit place wrote it")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="with --plain: model to take the tokenizer from, if the checkpoint has none")
    ] = None,
    drop_unknown: Annotated[
        bool, typer.Option("--drop-unknown", help="with --plain: leave out what the source holds beyond the model")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, at the very end, if it is there.")
    ] = False,
) -> None:
    """Rewrite a checkpoint that several ranks saved.

    Any number of ranks opens such a checkpoint as it is, in any placement; --ep N rewrites it so that each of N ranks
    finds its experts in one file, optimizer state included. --plain writes one Hugging Face folder, layer by layer:
    memory holds the heaviest layer about twice, never the model.
    """
    from moekit.jobs.estimates import Item, JobEstimate, disk_bytes
    from moekit.parallel.checkpoints import reshard as library

    if (ep is None) == (not plain):
        raise BadConfig("say either --ep N or --plain", hint="moekit reshard --help shows both")
    if (placement is not None and plain) or ((tokenizer is not None or drop_unknown) and not plain):
        raise BadConfig("--placement goes with --ep, --drop-unknown and --tokenizer with --plain", hint="leave it out")
    found = library.sizes(folder)
    if terminal.dry_run:
        total = found.weights + (0 if plain else found.optimizer)
        memory = 2 * found.largest_layer if plain else found.largest_tensor
        writes = (Item(str(out), total),)
        terminal.estimate(JobEstimate((Item(str(folder), disk_bytes(folder)),), writes, disk=total, memory=memory))
        return
    if plain:
        record = library.plain(
            folder,
            out,
            tokenizer=tokenizer,
            overwrite=overwrite,
            drop_unknown=drop_unknown,
            progress=terminal.progress,
        )
        terminal.answer(out=str(out), ranks=found.ranks, bytes=found.weights, fingerprint=record.fingerprint)
        terminal.say(
            f"wrote {out}: {size(found.weights)} of weights, saved by {found.ranks} ranks; transformers opens it"
        )
        return
    assert ep is not None
    index = library.reshard(
        folder, out, ranks=ep, placement=_read(placement), overwrite=overwrite, progress=terminal.progress
    )
    terminal.answer(out=str(out), ranks_before=found.ranks, ranks=ep, files=index.shards)
    rows = [(name, size(nbytes)) for name, nbytes in index.shards.items()]
    terminal.table(f"{found.ranks} ranks -> {ep}", ("file", "size"), rows)
    terminal.say(f"wrote {out}")


def _read(placement: Path | None) -> Any:
    if placement is None:
        return None
    from moekit.placement import Placement

    return Placement.load(placement)


def build() -> Any:
    """The command."""
    return build_command(
        reshard,
        examples=[
            "moekit reshard ./run/checkpoint-100 --ep 8 -o ./on-eight",
            "moekit reshard ./run/checkpoint-100 --plain -o ./plain",
        ],
    )
