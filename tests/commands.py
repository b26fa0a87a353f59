"""What a call of the command line came to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Done(NamedTuple):
    """Exit code, and what was printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The answer of a command with --json."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    def says(self, words: str) -> bool:
        """Whether a pattern is found in all that was printed, wherever lines break."""
        return re.search(words, " ".join((self.out + self.err).split())) is not None


Moekit = Callable[..., Done]
