"""Ways out are told in words of the command line where a command's user reads them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "moekit"
# What commands run through; `runtime` and `checkpoint` speak to those who hold a model in Python.
FOLDERS = (
    "compress",
    "diagnose",
    "evaluation",
    "jobs",
    "parallel",
    "routing",
    "serving",
    "streaming",
    "trace",
)
ARGUMENT = re.compile(r"""\b[a-z_]+=(?:True|False|None|["'a-z])""")


def hints(file: Path) -> Iterator[tuple[int, str]]:
    """Line and constant text of every way out."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "hint":
            parts = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            yield node.value.lineno, "".join(parts)


@pytest.mark.parametrize("folder", FOLDERS)
def test_python_words_are_told_as_such(folder: str) -> None:
    files = sorted((SOURCE / folder).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(SOURCE)}:{line}: {text}"
        for file in files
        for line, text in hints(file)
        if ARGUMENT.search(text) and not any(word in text for word in ("--", "Python"))
    ]
    assert wrong == []
