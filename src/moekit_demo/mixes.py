"""Named mixes of sources with clearly different domains."""

from __future__ import annotations

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

# As for text, of each place the first that can be had is taken; made questions need nothing but the text.
QUESTION_MIXES: dict[str, tuple[tuple[str, ...], ...]] = {"demo": (("analogies", "quiz"), ("continuations:demo",))}
