"""Whether a curve of quality against traffic shows anything: degenerate (a failure), flat (a finding), or a trade-off.

A degenerate curve comes from what was measured, a flat one from the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Savings below one row in a hundred are called flat, however narrow their interval.
FLAT = 0.01


def degenerate(rows: Sequence[float], *, devices: int, top_k: int) -> str | None:
    """Say why the rows of a curve cannot vary, or are impossible; None if they can.

    A token is sent to at least one and at most min(k, D) devices, so a curve says nothing if that leaves no room, or
    if every point lies at the same number of rows.

    Args:
        rows: rows sent per token and layer at each point, once per device; plain top-k included.
        devices: D, how many devices share the experts.
        top_k: k, experts of a token.

    Returns:
        The reason, as a sentence.
    """
    if len(rows) < 2:
        return f"the curve has {len(rows)} point, which shows no trade-off"
    if not all(math.isfinite(r) for r in rows):
        return "the rows of some point are not a number"
    most = min(top_k, devices)
    slack = 1e-6 * most
    if min(rows) < 1 - slack or max(rows) > most + slack:
        wrong = min(rows) if min(rows) < 1 - slack else max(rows)
        return f"{wrong:.4f} rows per token are impossible: {top_k} experts on {devices} devices give 1 to {most}"
    if most == 1:
        return f"with {top_k} experts per token on {devices} devices every token sends exactly one row"
    if min(rows) > devices - slack:
        return f"every token touches every one of the {devices} devices at every point"
    if max(rows) - min(rows) <= slack:
        return f"every point sends the same {rows[0]:.4f} rows per token"
    return None


def flat(rows: Sequence[float], baseline: float) -> bool:
    """Whether no point of a curve sends at least one row in a hundred fewer than the baseline does."""
    return min(rows) > baseline * (1 - FLAT)
