"""Named mixes of sources with clearly different domains."""

from __future__ import annotations

import logging

from moekit._progress import Progress
from moekit.data.sources import get_source
from moekit.errors import BadData

logger = logging.getLogger(__name__)

# Each place in a mix names sources in order of preference: the first that can be had here is taken. The demo prefers
# what comes through pip, which is there wherever moekit is: everyone then reads the same text.
MIXES: dict[str, tuple[tuple[str, ...], ...]] = {
    "demo": (
        ("news", "brown"),
        ("wikipedia", "austen"),
        ("stdlib",),
        ("german", "manpages-de"),
        ("wikipedia-bg", "manpages-ru"),
    ),
    "six-domains": (("brown",), ("austen",), ("kernel-docs",), ("stdlib",), ("manpages-de",), ("gcide",)),
}


def resolve_mix(name: str, progress: Progress | None = None) -> list[str]:
    """Fetch the sources of a mix, and say which were taken.

    Raises:
        BadData: for one place none of the sources can be had; names each reason.
    """
    chosen: list[str] = []
    for candidates in MIXES[name]:
        reasons: list[str] = []
        for candidate in candidates:
            try:
                get_source(candidate).fetch(progress)
            except BadData as error:
                logger.warning("%s: %s", candidate, error.message)
                reasons.append(f"{candidate}: {error.message}")
                continue
            chosen.append(candidate)
            break
        else:
            raise BadData(
                f"the mix {name!r} needs one of {', '.join(candidates)}: {'; '.join(reasons)}",
                hint="check the network, or give text of your own (data=FOLDER, each file or sub-folder a domain)",
            )
    return chosen
