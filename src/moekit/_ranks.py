"""Which of the processes that torchrun started this one is."""

from __future__ import annotations

import os


def is_first_rank() -> bool:
    """Whether this process is the only one or, under torchrun, the first: the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"
