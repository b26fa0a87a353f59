"""By the clock, how long a dispatcher plans, packs, waits, computes and adds up; forward and backward.

Waits are noted by the links themselves. Here functions of a dispatcher are wrapped for as long as a profile lasts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor

from moekit.parallel.dispatcher import Dispatcher


class Clock:
    """Seconds by name; what is spent in a named part counts there only, not in the part that it is called from."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._inside = [0.0]

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Add the time of a block."""
        started = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.add(name, spent - self._inside.pop())
            self._inside[-1] += spent

    def add(self, name: str, seconds: float) -> None:
        """Add time."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.during(name):
                return function(*args, **kwargs)

        return timed


def time_experts(run: Callable[..., Tensor], clock: Clock) -> Callable[..., Tensor]:
    """Local experts, timed forward, and backward from the gradient of their output to that of their input."""

    def timed(rows_QH: Tensor, *rest: Tensor) -> Tensor:
        with clock.during("experts, forward"):
            sums_QH = run(rows_QH, *rest)
        if sums_QH.requires_grad and rows_QH.requires_grad:
            begun: list[float] = []
            output, given = cast(Any, sums_QH), cast(Any, rows_QH)
            output.register_hook(lambda _: begun.append(time.perf_counter()))
            given.register_hook(lambda _: clock.add("experts, backward", time.perf_counter() - begun.pop()))
        return sums_QH

    return timed


def time_dispatcher(dispatcher: Dispatcher, clock: Clock) -> None:
    """Wrap plan, dispatch and combine of a dispatcher, and of those that it is made of."""
    stages: list[Any] = [dispatcher, *(part for part in vars(dispatcher).values() if isinstance(part, Dispatcher))]
    for stage in stages:
        if hasattr(stage, "plan"):
            stage.plan = clock.wrap("plan", stage.plan)
        stage.dispatch = clock.wrap("pack and begin to send", stage.dispatch)
        stage.combine = clock.wrap("unpack, hand to experts, add up", stage.combine)
        counters: list[Any] = list(stage.traffic.values())
        for traffic in counters:
            traffic.spent = _noting(clock)


def _noting(clock: Clock) -> Callable[[str, float], None]:
    """What links note as waited for is no longer counted where they are called from."""

    def spent(phase: str, seconds: float) -> None:
        clock.add(phase, seconds)
        if len(clock._inside) > 1:
            clock._inside[-1] += seconds

    return spent
