"""What the documentation says works: its command lines parse, its pages build, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moekit import catalogue
from moekit.cli._options import fields_of
from moekit.cli.main import COMMANDS, build

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Stands in for packages that the reader is told to write.
ELSEWHERE = {"coolest", "fade", "surest", "--purest"}


def parse(line: str) -> None:
    """Parse a command line to the end without running it.

    Raises:
        Exception: an unknown command, option or value.
    """
    words = shlex.split(line, comments=True)
    command: Any = build()
    context = command.make_context("moekit", ["--help"], resilient_parsing=True)
    name, rest = words[0], words[1:]
    while hasattr(command, "get_command"):
        name, rest = rest[0], rest[1:]
        command = command.get_command(context, name)
        assert command is not None, f"no command {name!r} in: {line}"
    command.make_context(name, rest)


def lines_of(text: str) -> list[str]:
    """Lines that call moekit, also by a launcher."""
    found = re.findall(r"^ *(?:torchrun .*-m )?(moekit [a-z].*)$", text, flags=re.MULTILINE)
    return [line.strip() for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_command_lines_of_the_documentation_parse(page: Path) -> None:
    text = page.read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) for line in lines_of(block)]
    # In a sentence a command may be named in part; with a path it is one to copy.
    lines += re.findall(r"`(moekit [^`]* \./[^`]*)`", text)
    for line in lines:
        if not ELSEWHERE & set(line.split()):
            parse(line)


def test_the_lines_of_launchers_and_sentences_are_among_those_that_parse() -> None:
    text = (ROOT / "docs" / "expert-parallel.md").read_text()
    assert any(line.startswith("moekit train ") for line in lines_of(text))
    assert re.search(r"`moekit [^`]* \./", (ROOT / "docs" / "pruning.md").read_text())


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_command_lines_of_recipes_parse(recipe: Path) -> None:
    for line in lines_of(re.sub(r"^# *", "", recipe.read_text(), flags=re.MULTILINE)):
        parse(line)


def test_command_lines_of_the_benchmark_of_memory_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    found = runpy.run_path(str(ROOT / "benchmarks" / "peak_memory.py"))
    # It asks a model how many experts a token chooses; there is none here.
    monkeypatch.setitem(found["commands"].__globals__, "choices", lambda moe: 8)
    lines = [*found["commands"]("./moe", "./text", Path("./out")).values(), found["conversion"]("./moe", "./text")]
    assert len(lines) > 10
    for line in lines:
        parse(shlex.join(["moekit", *line]))


def examples(command: Any) -> list[str]:
    """Example lines of a command and of all its sub-commands."""
    if hasattr(command, "get_command"):
        return [line for name in command.list_commands(None) for line in examples(command.get_command(None, name))]
    return lines_of((command.epilog or "").replace("\\[", "["))


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_parse(name: str) -> None:
    found = examples(build().get_command(None, name))
    assert found
    for line in found:
        assert line.startswith(f"moekit {name}")
        parse(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        made = target.startswith("methods/") or target == "changelog.md"
        if not made and not re.match(r"https?:", target):
            assert (page.parent / target).exists(), target


def test_every_method_has_a_page() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import gen_methods
    finally:
        sys.path.remove(str(ROOT / "docs"))
    pages = gen_methods.pages()
    assert set(pages) == {"methods/index.md"} | {f"methods/{r.kind}-{r.name}.md" for r in catalogue.methods()}
    for record in catalogue.methods():
        text = pages[f"methods/{record.kind}-{record.name}.md"]
        assert record.summary in " ".join(text.split())
        assert all(limit in text for limit in record.limits)
        assert all(f"`{option}`" in text for option in fields_of(record.cls))


@pytest.mark.slow
def test_the_documentation_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "methods" / "routing-c2r" / "index.html").is_file()
