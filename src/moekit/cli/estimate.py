"""`moekit estimate`: what a model needs, before anything is downloaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moekit.cli._command import build_command
from moekit.cli._terminal import Terminal, size


def estimate(
    terminal: Terminal,
    model: Annotated[str, typer.Argument(help="folder or hub id", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub model")] = None,
    dtype: Annotated[
        str, typer.Option(help="of the weights in memory: float32, bfloat16, or auto: as stored")
    ] = "auto",
) -> None:
    """Say what a model needs in memory, disk and time, from its config and headers alone.

    Of a hub model a few kilobytes are fetched, never a weight.
    """
    from moekit.checkpoint.estimate import estimate as estimate_model

    found = estimate_model(model, revision=revision, dtype=dtype)
    terminal.answer(**found.model_dump(mode="json"))
    if terminal.dry_run:
        terminal.say("only the config and the headers are read, and nothing is written")
        terminal.answer(dry_run=True)
        return
    active = found.active_parameters / max(found.parameters, 1)
    terminal.table(
        f"{found.model} ({found.model_type})",
        ("what", "value"),
        [
            ("MoE layers, experts, choices a token", f"{found.moe_layers}, {found.experts}, {found.top_k}"),
            ("parameters", f"{found.parameters / 1e6:,.1f} M, {active:.0%} of them active for a token"),
            ("disk", f"{size(found.disk_bytes)} in {found.shards} files, {size(found.download_bytes)} to download"),
            ("memory, loaded", f"{size(found.load_bytes)}, {size(found.peak_load_bytes)} while loading"),
            ("memory, fine-tuning in fp32 with Adam", f"{size(found.train_bytes)} and activations"),
            ("cache", f"{size(found.cache_bytes_per_token)} a token"),
            *((f"time: {name.replace('_', ' ')}", f"{seconds:,.1f} s") for name, seconds in found.seconds.items()),
        ],
    )


def build() -> Any:
    """The command."""
    return build_command(
        estimate, examples=["moekit estimate allenai/OLMoE-1B-7B-0924", "moekit estimate ./moe --json"]
    )
