"""Colours of the page, in light and in dark; tests hold their contrast to WCAG AA."""

from __future__ import annotations

from moekit.report.charts.heatmaps import LEVELS

LIGHT = {
    "page": "#ffffff",
    "panel": "#f6f7f9",
    "text": "#171b21",
    "soft": "#535c68",
    "line": "#d9dde3",
    "accent": "#0b5cad",
    "good": "#0f6b3c",
    "bad": "#b3261e",
    "fail": "#b3261e",
    "on-fail": "#ffffff",
    "c0": "#0b5cad",
    "c1": "#c2500a",
    "c2": "#0f7a55",
    "c3": "#9b2f83",
    "c4": "#7a6200",
    "c5": "#5b5f66",
}

DARK = {
    "page": "#11141a",
    "panel": "#1a1f27",
    "text": "#e8ebef",
    "soft": "#a3adba",
    "line": "#333b47",
    "accent": "#7ab8ff",
    "good": "#6fd39b",
    "bad": "#ff9a8f",
    "fail": "#ff9a8f",
    "on-fail": "#2a0805",
    "c0": "#7ab8ff",
    "c1": "#ffa45c",
    "c2": "#5fd3a6",
    "c3": "#ec9bd9",
    "c4": "#e2c64b",
    "c5": "#b6bcc6",
}

# Dashes and gaps of curves.
_DASHES = ("7 4", "2 4", "11 3 2 3", "14 4", "5 2", "3 2")

# From nothing to the maximum.
_HEAT_LIGHT = ("#f3f5f8", "#c6dcf0", "#6eaad9", "#1f66ad", "#0a2a57")
_HEAT_DARK = ("#1b2028", "#173a5c", "#1e6fae", "#69b7ea", "#e9f6ff")


def _channels(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def ramp(anchors: tuple[str, ...], levels: int = LEVELS) -> list[str]:
    """Colours evenly spread along anchors."""
    found = []
    for i in range(levels):
        at = i / (levels - 1) * (len(anchors) - 1)
        k = min(int(at), len(anchors) - 2)
        a, b = _channels(anchors[k]), _channels(anchors[k + 1])
        mixed = (round(255 * (x + (y - x) * (at - k))) for x, y in zip(a, b, strict=True))
        found.append("#" + "".join(f"{v:02x}" for v in mixed))
    return found


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it, 1 to 21."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _channels(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def variables(dark: bool) -> str:
    """Custom properties of one scheme."""
    colours = dict(DARK if dark else LIGHT)
    colours |= {f"h{i}": c for i, c in enumerate(ramp(_HEAT_DARK if dark else _HEAT_LIGHT))}
    return "".join(f"--{name}:{colour};" for name, colour in colours.items()) + (
        "color-scheme:dark;" if dark else "color-scheme:light;"
    )


def style() -> str:
    """Return the colours' style sheet: the system's scheme unless the reader chose another; print is light."""
    series = "".join(f".f{i}{{fill:var(--c{i})}}.s{i}{{stroke:var(--c{i})}}" for i in range(6))
    series += "".join(f".d{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(_DASHES))
    heat = "".join(f".h{i}{{fill:var(--h{i})}}" for i in range(LEVELS))
    light, dark = variables(False), variables(True)
    return (
        f":root{{{light}}}"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}"
        f":root[data-theme=dark]{{{dark}}}"
        f"@media print{{:root,:root[data-theme],:root:not([data-theme=light]){{{light}}}}}"
        f"{series}{heat}"
    )
