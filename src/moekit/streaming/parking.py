"""The tensors of a paused pass on disk, and in their places again when it goes on.

A pass's own code holds its tensors, so that they cannot be exchanged; but what they lie in can. While a pass is parked
each of them is empty, and whoever else holds such an object would get an error, never a wrong number.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moekit.streaming.nested import tensors_in
from moekit.streaming.spill import Slot, Spill, bytes_of


def storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """What tensors lie in, each once, by its address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage
    return found


def kept_by(model: nn.Module) -> set[int]:
    """Addresses of what the modules of a model keep beside weights: buffers, tables they have made for themselves."""
    own = list(model.buffers())
    for module in model.modules():
        own.extend(tensors_in(value for key, value in vars(module).items() if key not in ("_parameters", "_modules")))
    return set(storages_of(tensor for tensor in own if not tensor.is_meta))


@dataclass(eq=False)
class _Lain:
    """A storage that lies on disk: where it belongs, and which tensors were in it, each with offset, sizes, strides."""

    device: torch.device
    slot: Slot
    tensors: list[tuple[Tensor, int, torch.Size, tuple[int, ...]]] = field(default_factory=list)


@dataclass(eq=False)
class _Copy:
    """What of a storage the file holds already: valid as long as no tensor in it was written to.

    Tensors are known by themselves: addresses are given out again as soon as they are free.
    """

    slot: Slot
    versions: list[tuple[weakref.ref[Tensor], int]]

    def holds(self, group: Sequence[Tensor]) -> bool:
        """Whether these tensors, of one storage, have in them what was copied."""
        alive = [(tensor, version) for ref, version in self.versions if (tensor := ref()) is not None]
        own = {id(tensor) for tensor in group}
        return bool(alive) and all(id(tensor) in own and tensor._version == version for tensor, version in alive)


class Parking:
    """Puts tensors of one pass on disk and back.

    Args:
        spill: the file.
    """

    def __init__(self, spill: Spill) -> None:
        self._spill = spill
        self._away: list[_Lain] = []
        # Address of a storage -> its copy in the file, of those that were put back and may not have changed.
        self._copies: dict[int, _Copy] = {}

    @property
    def away(self) -> bool:
        """Whether the pass is parked."""
        return bool(self._away)

    @property
    def nbytes(self) -> int:
        """Bytes of the pass on disk."""
        return sum(lain.slot.nbytes for lain in self._away)

    @torch.no_grad()
    def park(self, tensors: Iterable[Tensor], stays: Callable[[int], bool]) -> None:
        """Put tensors on disk.

        Args:
            tensors: all that the pass holds.
            stays: whether the storage of an address is others' as well and stays in memory.
        """
        groups: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and not stays(storage.data_ptr()):
                groups.setdefault(storage.data_ptr(), []).append(tensor)
        copies, self._copies = self._copies, {}
        for address, group in groups.items():
            copy = copies.pop(address, None)
            storage = group[0].untyped_storage()
            if copy is not None and copy.holds(group):
                slot = copy.slot
            else:
                if copy is not None:
                    self._spill.free(copy.slot)
                slot = self._spill.put(bytes_of(storage).cpu())
            lain = _Lain(storage.device, slot)
            for tensor in group:
                lain.tensors.append((tensor, int(tensor.storage_offset()), tensor.shape, tensor.stride()))
                tensor.set_()  # type: ignore[call-overload]
            self._away.append(lain)
        for copy in copies.values():
            self._spill.free(copy.slot)

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        away, self._away = self._away, []
        for lain in away:
            storage = self._spill.get(lain.slot).to(lain.device).untyped_storage()
            for tensor, offset, shape, stride in lain.tensors:
                tensor.set_(storage, offset, shape, stride)
            versions = [(weakref.ref(tensor), tensor._version) for tensor, *_ in lain.tensors]
            self._copies[storage.data_ptr()] = _Copy(lain.slot, versions)

    def forget(self) -> None:
        """Give the pass's places in the file back."""
        for slot in [*(lain.slot for lain in self._away), *(copy.slot for copy in self._copies.values())]:
            self._spill.free(slot)
        self._away, self._copies = [], {}
