"""An mkdocs hook: one page per method, made from the catalogue, so that a page can be neither missing nor outdated.

Methods of installed packages get a page like our own.
"""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from moekit import catalogue
from moekit.cli._examples import example_of
from moekit.cli.methods import linked, page


def pages() -> dict[str, str]:
    """Path below docs/ -> Markdown."""
    made: dict[str, str] = {}
    rows = ["# Methods", "", "Every method that `moekit methods` lists.", ""]
    records = list(catalogue.methods())
    for kind in catalogue.kinds():
        own = [record for record in records if record.kind == kind.name]
        rows += [f"## {kind.title}", ""]
        if own and (example := example_of(own[0])):
            rows += ["```sh", example, "```", ""]
        rows += ["| method | paper | what it does |", "|---|---|---|"]
        for record in own:
            name = f"{record.kind}-{record.name}.md"
            made[f"methods/{name}"] = page(record)
            rows.append(f"| [{record.name}]({name}) | {linked(record.paper) or '-'} | {record.summary} |")
        rows.append("")
    return {"methods/index.md": "\n".join(rows), **made}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages into the navigation, those of a kind under its title."""
    for position, entry in enumerate(config["nav"]):
        if isinstance(entry, dict) and entry.get("Methods") == "methods/":
            config["nav"][position] = {"Methods": ["methods/index.md", *_by_kind()]}
    return config


def _by_kind() -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, str]]] = {}
    titles = {kind.name: kind.title for kind in catalogue.kinds()}
    for record in catalogue.methods():
        page_of = {record.name: f"methods/{record.kind}-{record.name}.md"}
        groups.setdefault(titles[record.kind], []).append(page_of)
    return [{title: groups[title]} for title in titles.values() if title in groups]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages as files that exist in memory only, and the changelog."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    with open("CHANGELOG.md", encoding="utf-8") as stream:
        files.append(File.generated(config, "changelog.md", content=stream.read()))
    return files
