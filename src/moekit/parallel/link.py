"""A process group that rows travel over: two collectives, counted where they are called.

Legend: R ranks, P rows sent, Q rows received, B bytes of a packed row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moekit.errors import PeerLost
from moekit.parallel.launch.health import note
from moekit.parallel.traffic import Pass, Traffic, Way

# torch 2.13 renames both.
_ALL_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(eq=False)
class Link:
    """One process group and its counters.

    Attributes:
        group: ranks that exchange rows; None for the default group.
        traffic: what was sent.
        members: global ranks of the group, in order.
    """

    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)
    members: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.members = tuple(dist.get_process_group_ranks(self.group or dist.group.WORLD))

    @property
    def rank(self) -> int:
        """Own place in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """R."""
        return len(self.members)

    def call(self, collective: Callable[[], Any], *, begins: bool = True, ends: bool = True) -> Any:
        """Carry out a collective; what a backend throws when a peer is gone becomes our error.

        Args:
            collective: the call.
            begins: whether it enters a collective, for those who watch this rank.
            ends: whether the collective is over when it returns.

        Raises:
            PeerLost: a rank died, stalled or ran other code.
        """
        if begins:
            note()
        try:
            answer = collective()
        except (RuntimeError, dist.DistError) as error:
            raise PeerLost(
                f"an exchange between ranks failed: {str(error).splitlines()[0]}",
                hint="a rank died, stalled, or ran other code than this one; its own last lines say why",
            ) from error
        if ends:
            note(finished=True)
        return answer

    def all_gather(self, values: Tensor) -> Tensor:
        """Equal parts of all ranks, one after the other along the first dimension."""
        whole = values.new_empty(len(values) * self.size, *values.shape[1:])
        self.call(lambda: _ALL_GATHER(whole, values.contiguous(), group=self.group))
        return whole

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """The sum over ranks, of which each gets its part along the first dimension."""
        own = values.new_empty(len(values) // self.size, *values.shape[1:])
        self.call(lambda: _REDUCE_SCATTER(own, values.contiguous(), group=self.group))
        return own

    def exchange_counts(self, counts_R: Tensor) -> PendingCounts:
        """Begin to tell every rank how many rows it will get."""
        received_R = torch.empty_like(counts_R)
        work = None
        if self.size == 1:
            received_R.copy_(counts_R)
        else:
            self.traffic.counted([counts_R.element_size()] * self.size)
            work = self.call(
                lambda: dist.all_to_all_single(received_R, counts_R, group=self.group, async_op=True), ends=False
            )
        return PendingCounts(counts_R, received_R, work, self)

    def exchange_rows(
        self, packed_PB: Tensor, send: list[int], receive: list[int], direction: Pass, way: Way
    ) -> PendingRows:
        """Begin to send packed rows, ordered by rank.

        Args:
            packed_PB: rows, of any type, of equal size.
            send: rows for each rank.
            receive: rows from each rank.
            direction: for the counters.
            way: for the counters.
        """
        received_QB = packed_PB.new_empty((sum(receive), *packed_PB.shape[1:]))
        row_bytes = packed_PB.shape[1] * packed_PB.element_size()
        self.traffic.sent(direction, way, send, row_bytes)
        work = None
        if self.size == 1:
            received_QB.copy_(packed_PB)
        else:
            work = self.call(
                lambda: dist.all_to_all_single(received_QB, packed_PB, receive, send, group=self.group, async_op=True),
                ends=False,
            )
        return PendingRows(packed_PB, received_QB, work, self, f"{direction} {way}")


@dataclass(eq=False)
class PendingCounts:
    """Counts on their way."""

    sent_R: Tensor
    received_R: Tensor
    work: Any
    link: Link

    def wait(self) -> tuple[list[int], list[int]]:
        """Rows for each rank, and from each."""
        started = time.perf_counter()
        if self.work is not None:
            self.link.call(self.work.wait, begins=False)
        send, receive = torch.stack([self.sent_R, self.received_R]).tolist()
        self.link.traffic.spent("waiting for counts", time.perf_counter() - started)
        return send, receive


@dataclass(eq=False)
class PendingRows:
    """Rows on their way; what is sent must live until they have arrived."""

    sent_PB: Tensor
    received_QB: Tensor
    work: Any
    link: Link
    phase: str

    def wait(self) -> Tensor:
        """The rows, ordered by the rank they come from."""
        started = time.perf_counter()
        if self.work is not None:
            self.link.call(self.work.wait, begins=False)
        self.link.traffic.spent(f"waiting for rows, {self.phase}", time.perf_counter() - started)
        return self.received_QB
