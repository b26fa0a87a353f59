"""Names that a user may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(name: str, known: Iterable[str], *, most: int = 3, otherwise: str | None = None) -> str:
    """A hint for a name that is not known: what is spelt alike, or else all there is.

    Args:
        name: as given.
        known: names there are.
        most: how many near ones to tell.
        otherwise: what to say where none is near; by default all there are.
    """
    names = list(known)
    found = difflib.get_close_matches(name, names, n=most)
    if found:
        return f"did you mean {' or '.join(map(repr, found))}?"
    return f"there are: {', '.join(names) or 'none'}" if otherwise is None else otherwise
