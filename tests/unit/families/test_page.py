"""The page of families: its table is what `moekit families --json` wrote, the newest release first."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_families", DOCS / "gen_families.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_page_holds_a_row_for_every_family(hook: ModuleType) -> None:
    path, date = hook.newest()
    found = json.loads(path.read_text())
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="families.md"))
    made = hook.on_page_markdown((DOCS / "families.md").read_text(), page, None, None)
    assert hook.MARK not in made
    assert found["transformers"] in path.name
    assert f"transformers {found['transformers']}, {date}" in made
    rows = [line for line in made.splitlines() if line.startswith("| `")]
    for family in found["families"]:
        of_it = [row for row in rows if f"`{family['name']}`" in row]
        assert of_it
        said = any(cell["message"] for cell in family["cells"].values())
        assert (len(of_it) > 1) == said
    other: Any = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    assert hook.on_page_markdown("text", other, None, None) == "text"


def test_the_newest_release_counts_by_number(hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("5.9.0-2026-12-01", "5.24.0-2026-11-01", "5.24.0-2026-11-02"):
        (tmp_path / f"transformers-{name}.json").write_text("{}")
    (tmp_path / "notes.json").write_text("{}")
    monkeypatch.setattr(hook, "FOLDER", tmp_path)
    assert hook.newest() == (tmp_path / "transformers-5.24.0-2026-11-02.json", "2026-11-02")


def test_a_message_cannot_break_the_table(hook: ModuleType) -> None:
    cell = hook._cell("a | b\nc <x>\n  -> do `this`")
    assert cell == "a \\| b c \\<x\\><br>do \\`this\\`"
    assert len(hook._cell("x" * 1000)) < 320
