"""Where the time of a step goes, on one rank: by phase, and by operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from moekit.bench.dispatch.competitors.base import Peer

# Operations to name.
MOST = 14


def profile(step: Callable[[], Any], peers: Sequence[Peer], rounds: int) -> dict[str, Any]:
    """Run a step some times by the clock, and once more under torch's profiler.

    Args:
        step: forward and backward; its first two answers are seconds.
        peers: layers whose phases are asked for.
        rounds: by the clock.

    Returns:
        Milliseconds a step: "forward", "total", "phases" by name, "operations" (self time, calls).
    """
    seconds: dict[str, float] = {}
    told = [peer.phases(seconds) for peer in peers]
    step()
    seconds.clear()
    forward = total = 0.0
    for _ in range(rounds):
        first, both, _ = step()
        forward, total = forward + first, total + both
    phases = {name: spent / rounds * 1e3 for name, spent in seconds.items()}
    if any(told):
        phases["the rest"] = total / rounds * 1e3 - sum(phases.values())
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)[:MOST]
    return {
        "forward": forward / rounds * 1e3,
        "total": total / rounds * 1e3,
        "phases": phases,
        "operations": [(e.key, e.self_cpu_time_total / 1e3, e.count) for e in events],
    }
