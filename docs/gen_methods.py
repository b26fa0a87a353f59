"""An mkdocs hook: one page per method, made from the catalogue, so that a page can be neither missing nor outdated.

Methods of installed packages get a page like our own.
"""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from moekit import catalogue
from moekit.cli.methods import page


def pages() -> dict[str, str]:
    """Path below docs/ -> Markdown."""
    made: dict[str, str] = {}
    rows = ["# Methods", "", "Every method that `moekit methods` lists.", ""]
    records = list(catalogue.methods())
    for kind in catalogue.kinds():
        rows += [f"## {kind.title}", "", "| method | paper | what it does |", "|---|---|---|"]
        for record in (r for r in records if r.kind == kind.name):
            name = f"{record.kind}-{record.name}.md"
            made[f"methods/{name}"] = page(record)
            rows.append(f"| [{record.name}]({name}) | {record.paper or '-'} | {record.summary} |")
        rows.append("")
    return {"methods/index.md": "\n".join(rows), **made}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages into the navigation."""
    for position, entry in enumerate(config["nav"]):
        if isinstance(entry, dict) and entry.get("Methods") == "methods/":
            paths = list(pages())
            named: list[Any] = [{path.split("/")[1].removesuffix(".md"): path} for path in paths[1:]]
            config["nav"][position] = {"Methods": [paths[0], *named]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages as files that exist in memory only, and the changelog."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    with open("CHANGELOG.md", encoding="utf-8") as stream:
        files.append(File.generated(config, "changelog.md", content=stream.read()))
    return files
