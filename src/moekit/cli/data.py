"""`moekit data`: what text, questions and models there are, and fetching them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moekit.cli._command import build_command
from moekit.cli._steps import build_step_command
from moekit.cli._terminal import Terminal, size


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

    folders: dict[str, str] = {}
    for name in names:
        if terminal.dry_run:
            _foretell(terminal, name)
            continue
        for source in resolve_mix(name, terminal.progress) if name in text_mixes() else [name]:
            folders[source] = str(fetch_source(source, terminal.progress))
            terminal.say(f"{source}: {get_source(source).info().licence}, in {folders[source]}")
    if not terminal.dry_run:
        terminal.answer(folders=folders)


def _foretell(terminal: Terminal, name: str) -> None:
    from moekit.data.sources import get_source, text_mixes
    from moekit.jobs.shared.estimates import Forecast, Item, Sizes
    from moekit.jobs.shared.inputs import text_item

    item = text_item(name, Sizes())
    first = text_mixes()[name][0][0] if name in text_mixes() else name
    kept = get_source(first).folder.parent
    terminal.forecast(Forecast((item,), (Item(str(kept), item.nbytes),), disk=item.nbytes, memory=item.nbytes))


def _show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    rows = [
        (domain, split, part["documents"], part["bytes"])
        for domain, parts in results.get("domains", {}).items()
        for split, part in parts.items()
    ]
    if rows:
        terminal.table("", ("domain", "split", "documents", "bytes"), rows)


def build() -> Any:
    """The group of commands."""
    from moekit.recipe.steps.data import DataStep

    settings = {"help_option_names": ["-h", "--help"]}
    help = "Fetch text, questions or the demo model: from packages, files or a hub."
    group = TyperGroup(name="data", help=help, no_args_is_help=True, rich_markup_mode="rich", context_settings=settings)
    group.add_command(build_command(list_sources, name="list", examples=["moekit data list"]))
    group.add_command(build_command(fetch, examples=["moekit data fetch smollm2 demo"]))
    group.add_command(
        build_step_command(
            DataStep,
            name="write",
            help=inspect_doc(DataStep),
            arguments=("source",),
            writes="folder to write",
            examples=["moekit data write six-domains ./text --train-bytes 2000000 --heldout-bytes 200000"],
            show=_show,
        )
    )
    return group


def inspect_doc(cls: type) -> str:
    """A class's docstring, cleaned."""
    import inspect

    return inspect.getdoc(cls) or ""
