"""Bytes as collectives are asked to send them: read from their arguments, whoever calls them.

The counters of a network device say what left a node with all headers; these say what it was, also where there is no
such device. What stays inside a node does not count. For gathers and reductions the number is that of sending each
block straight to every rank that needs it; a back-end may do otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode


class CollectiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up the bytes that this rank's collectives send to other nodes.

    Attributes:
        per_node: ranks of a node.
        across: bytes to other nodes.
        calls: collectives.
        unknown: names of collectives that it cannot count.
    """

    def __init__(self, per_node: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.per_node = per_node
        self.across = 0
        self.calls = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at a call, and let it happen."""
        if func.namespace in {"c10d", "_c10d_functional"}:
            self._note(func._schema.name.partition("::")[2], args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        if name in _SILENT:
            return
        read = _READERS.get(name)
        if read is None:
            self.unknown.add(name)
            return
        group, bytes_R = read(args)
        members = dist.get_process_group_ranks(group)
        self.calls += 1
        here = dist.get_rank() // self.per_node
        self.across += sum(n for member, n in zip(members, bytes_R, strict=True) if member // self.per_node != here)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _group(found: Any) -> dist.ProcessGroup:
    if isinstance(found, str):
        resolve: Any = c10d._resolve_process_group  # type: ignore[attr-defined]
        return cast(dist.ProcessGroup, resolve(found))
    return dist.ProcessGroup.unbox(found)


def _split(tensor: Tensor, splits: Sequence[int], group: dist.ProcessGroup) -> list[int]:
    size = group.size()
    if not splits:
        return [_nbytes(tensor) // size] * size
    row = _nbytes(tensor) // max(1, len(tensor))
    return [int(rows) * row for rows in splits]


def _all_to_all(args: tuple[Any, ...]) -> tuple[dist.ProcessGroup, list[int]]:
    group = _group(args[2])
    return group, _split(args[1], args[4], group)


def _functional_all_to_all(args: tuple[Any, ...]) -> tuple[dist.ProcessGroup, list[int]]:
    group = _group(args[3])
    return group, _split(args[0], args[2], group)


def _gather(args: tuple[Any, ...]) -> tuple[dist.ProcessGroup, list[int]]:
    group = _group(args[2])
    return group, [_nbytes(args[1])] * group.size()


def _scatter(args: tuple[Any, ...]) -> tuple[dist.ProcessGroup, list[int]]:
    group = _group(args[2])
    return group, [_nbytes(args[0])] * group.size()


def _reduce(args: tuple[Any, ...]) -> tuple[dist.ProcessGroup, list[int]]:
    group = _group(args[1])
    # A ring passes 2 (R - 1) / R of the tensor over each of its links: as if each rank got 2 / R.
    return group, [sum(map(_nbytes, args[0])) * 2 // group.size()] * group.size()


def _functional_reduce(args: tuple[Any, ...]) -> tuple[dist.ProcessGroup, list[int]]:
    group = _group(args[2])
    return group, [_nbytes(args[0]) * 2 // group.size()] * group.size()


def _send(args: tuple[Any, ...]) -> tuple[dist.ProcessGroup, list[int]]:
    group = _group(args[1])
    return group, [sum(map(_nbytes, args[0])) if rank == args[2] else 0 for rank in range(group.size())]


_SILENT = {"wait_tensor", "recv_", "recv_any_source_", "barrier", "_wrap_tensor_autograd"}
_READERS: dict[str, Any] = {
    "alltoall_base_": _all_to_all,
    "all_to_all_single": _functional_all_to_all,
    "_allgather_base_": _gather,
    "_reduce_scatter_base_": _scatter,
    "allreduce_": _reduce,
    "all_reduce": _functional_reduce,
    "all_reduce_": _functional_reduce,
    "send": _send,
}
