"""Hints for names that nothing has: near matches, else what there is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint_for(name: str, known: Iterable[str], *, most: int = 3, otherwise: str | None = None) -> str:
    """What a user may have meant by a name.

    Args:
        name: as given.
        known: names that exist.
        most: near matches to show.
        otherwise: what to say where none is near; by default all there are.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=most)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"there are: {', '.join(names) or 'none'}" if otherwise is None else otherwise
