"""An mkdocs hook: the table of families, from what `moekit families --json` wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

FOLDER = Path(__file__).parent / "families"
PAGE, MARK = "families.md", "<!-- table of families -->"
_SIGNS = {"yes": "yes", "refused": "no", "failed": "**fails**", "untried": "-"}
# transformers-5.23.0-2026-11-30.json
_NAME = re.compile(r"transformers-(?P<version>[\d.]+)-(?P<date>\d{4}-\d\d-\d\d)\.json")


def newest() -> tuple[Path, str]:
    """The file of the newest release of transformers, the last one made with it, and its date."""
    named = [(match, path) for path in FOLDER.glob("*.json") if (match := _NAME.fullmatch(path.name))]

    def age(entry: tuple[re.Match[str], Path]) -> tuple[tuple[int, ...], str]:
        return tuple(map(int, entry[0]["version"].split("."))), entry[0]["date"]

    match, path = max(named, key=age)
    return path, match["date"]


def table(found: dict[str, Any], date: str, name: str) -> str:
    """The table in Markdown, and below it what is not done, and why."""
    steps = found["steps"]
    rows = found["families"]
    works = sum(row["cells"]["stock"]["state"] == "yes" for row in rows)
    lines = [
        f"transformers {found['transformers']}, {date}: {len(rows)} families, {works} of which prune to a folder that "
        f"stock transformers loads ([the same as JSON](families/{name})).",
        "",
        f"| family | {' | '.join(steps)} |",
        f"|---|{'---|' * len(steps)}",
    ]
    for row in rows:
        cells = (_SIGNS[row["cells"][step]["state"]] for step in steps)
        lines.append(f"| `{row['name']}` | {' | '.join(cells)} |")
    lines += ["", "## Why not", "", "| family | tried | what moekit says |", "|---|---|---|"]
    for (families, tried), message in _reasons(steps, rows).items():
        lines.append(f"| {families} | {tried} | {message} |")
    return "\n".join(lines)


def _reasons(steps: list[str], rows: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """Families and what was tried -> what was said, in one cell of a table."""
    by_message: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        told: dict[str, list[str]] = {}
        for step in steps:
            cell = row["cells"][step]
            if cell["message"]:
                told.setdefault(_cell(cell["message"]), []).append(step)
        for message, tried in told.items():
            by_message.setdefault((message, ", ".join(tried)), []).append(f"`{row['name']}`")
    return {(", ".join(names), tried): message for (message, tried), names in by_message.items()}


def _cell(message: str, most: int = 300) -> str:
    """What a message says first, as plain text of a cell: the way out, if there is one, on a line of its own."""
    head, _, way_out = message.partition("\n  -> ")
    parts = [" ".join(part.split()) for part in (head, way_out) if part]
    short = [part if len(part) <= most else f"{part[:most]} ..." for part in parts]
    return "<br>".join(re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", part) for part in short)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the table where the page says."""
    if page.file.src_uri != PAGE:
        return markdown
    path, date = newest()
    return markdown.replace(MARK, table(json.loads(path.read_text(encoding="utf-8")), date, path.name))
