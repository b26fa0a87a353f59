"""The recipes that come with moekit, by name."""

from __future__ import annotations

from pathlib import Path

# Where a wheel holds them; a checkout has them in its root.
_IN_WHEEL = Path(__file__).parent / "packaged"
_IN_CHECKOUT = Path(__file__).parents[3] / "recipes"
_FOLDER = "recipes"


def recipes_folder() -> Path:
    """The folder of the recipes that come with moekit."""
    return _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT


def packaged_recipes() -> dict[str, str]:
    """Name of each recipe that comes with moekit -> what it does, by its first comment."""
    return {file.stem: _first_comment(file) for file in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(reference: str | Path) -> Path:
    """A recipe's file: the one of this path, or else the one that comes with moekit under this name.

    Args:
        reference: path of a file; or `c2r`, `c2r.yaml` or `recipes/c2r.yaml` for a recipe of moekit.

    Returns:
        The file; what was given, if there is neither.
    """
    given = Path(reference)
    if given.exists() or given.parent not in (Path(), Path(_FOLDER)) or given.suffix not in ("", ".yaml"):
        return given
    own = recipes_folder() / f"{given.stem}.yaml"
    return own if own.is_file() else given


def _first_comment(file: Path) -> str:
    lines: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines).rstrip(":")
