"""Reading recipes without trusting them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moekit.errors import BadConfig, UnsafeInput
from moekit.recipe.document import MAX_BYTES, read_document


def write(folder: Path, text: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(text)
    return file


def test_every_key_and_position_has_its_line(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "name: x\n\nsteps:\n  - use: data\n    source: demo\n  - {use: place}\n"))
    assert document.data == {"name": "x", "steps": [{"use": "data", "source": "demo"}, {"use": "place"}]}
    assert document.line(("name",)) == 1
    assert document.line(("steps", 0, "source")) == 5
    assert document.line(("steps", 1, "use")) == 6
    assert document.line(("steps", 0, "missing")) == 4


@pytest.mark.parametrize(
    "text",
    ["name: !!python/object/apply:os.system ['true']", "name: !!python/name:os.system", "a: !custom 1", "a: !!set {b}"],
)
def test_tags_are_unsafe(tmp_path: Path, text: str) -> None:
    with pytest.raises(UnsafeInput, match=r"line 1: the YAML tag"):
        read_document(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1, 2", "line 1"),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' was given on line 1"),
        ("- 1", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("a: " + "[" * 50_000, "nested more than"),
        ("? [1, 2]\n: 3", "a key must be a word"),
        ("a: &x [1]\nb: [" + ", ".join(["*x"] * 20) + "]", "more than 16 aliases"),
        ("a: 1\nb: c: d", "line 2"),
        ("a\tb: \x01", "r.yaml"),
    ],
)
def test_what_is_no_recipe_is_refused_with_the_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        read_document(write(tmp_path, text))


def test_laughs_stay_small(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 30)]
    with pytest.raises(BadConfig, match="aliases"):
        read_document(write(tmp_path, "\n".join(lines)))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="bytes; at most"):
        read_document(write(tmp_path, "#" * (MAX_BYTES + 1)))


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no such recipe"):
        read_document(tmp_path / "absent.yaml")
    (tmp_path / "b.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(BadConfig, match="UTF-8"):
        read_document(tmp_path / "b.yaml")
