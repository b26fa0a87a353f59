"""`moekit data`: what text, questions and models there are, and fetching them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli._command import build_command, build_group
from moekit.cli._jobs import command_of
from moekit.cli._terminal import Terminal, size
from moekit.jobs.table import jobs

if TYPE_CHECKING:
    from moekit.jobs.estimates import JobEstimate


def list_sources(terminal: Terminal) -> None:
    """List the sources that packages carry, and whether they can be had here. Nothing is downloaded."""
    from moekit.data import available
    from moekit.data.sources import text_mixes

    infos, mixes = available(), text_mixes()
    terminal.answer(
        sources=[vars(info) for info in infos], mixes={name: list(map(list, m)) for name, m in mixes.items()}
    )
    rows = [
        (
            info.name,
            info.kind,
            info.domain,
            info.origin,
            info.licence,
            size(info.download_bytes),
            info.cached or info.obtainable,
        )
        for info in infos
    ]
    terminal.table("", ("source", "kind", "domain", "from", "licence", "download", "here"), rows)
    for name, places in mixes.items():
        terminal.say(f"mix {name}: {', '.join(' or '.join(place) for place in places)}")


def fetch(
    terminal: Terminal,
    names: Annotated[list[str], typer.Argument(help="sources, or mixes of them", show_default=False)],
) -> None:
    """Bring sources into the cache, by the package clients of this machine."""
    from moekit.data import fetch as fetch_source
    from moekit.data.sources import get_source, resolve_mix, text_mixes

    if terminal.dry_run:
        _print_estimate(terminal, names)
        return
    folders: dict[str, str] = {}
    for name in names:
        for source in resolve_mix(name, terminal.progress) if name in text_mixes() else [name]:
            folders[source] = str(fetch_source(source, terminal.progress))
            terminal.say(f"{source}: {get_source(source).info().licence}, in {folders[source]}")
    terminal.answer(folders=folders)


def _print_estimate(terminal: Terminal, names: Sequence[str]) -> None:
    """All of them together: one comes after the other, and all stay."""
    from moekit.jobs.estimates import merged

    terminal.estimate(merged({name: _estimate(name) for name in names}))


def _estimate(name: str) -> JobEstimate:
    from moekit.data.sources import get_source, text_mixes
    from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
    from moekit.jobs.shared.inputs import text_item

    item = text_item(name, ByteSizes())
    first = text_mixes()[name][0][0] if name in text_mixes() else name
    kept = get_source(first).folder.parent
    return JobEstimate((item,), (Item(str(kept), item.nbytes),), disk=item.nbytes, memory=item.nbytes)


def build() -> Any:
    """The group of commands."""
    help = "Fetch text, questions or the demo model: from packages, files or a hub."
    examples = ["moekit data list", "moekit data write demo --train-bytes 2000000 --heldout-bytes 200000 -o ./text"]
    group = build_group(name="data", help=help, examples=examples)
    group.add_command(build_command(list_sources, name="list", examples=["moekit data list"]))
    group.add_command(build_command(fetch, examples=["moekit data fetch smollm2 demo"]))
    group.add_command(command_of(jobs()["data"], name="write"))
    return group
