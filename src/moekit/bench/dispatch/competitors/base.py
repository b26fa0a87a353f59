"""What every peer answers to.

Legend: N tokens of this rank, K choices, H hidden size, E experts, R ranks.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from moekit.bench.dispatch.setting import DispatchBenchSetting, Entry
from moekit.bench.dispatch.workload import fill
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.ranks import Ranks
from moekit.parallel.traffic import Traffic


@dataclass(eq=False)
class Material:
    """What a peer is built from, for one layer on one rank.

    Attributes:
        setting: sizes.
        entry: which way is measured.
        ranks: process groups.
        layout: who owns which expert.
        module: the experts' class without weights.
        tensors: whole stacked weights by name.
    """

    setting: DispatchBenchSetting
    entry: Entry
    ranks: Ranks
    layout: ExpertLayout
    module: nn.Module
    tensors: Mapping[str, Tensor]

    def own_experts(self) -> Any:
        """A module that holds this rank's experts."""
        return fill(self.module, self.tensors, self.layout.owned(self.ranks.rank), self.layout.experts)


class Peer(ABC):
    """One layer of experts on this rank.

    Attributes:
        needs_shared_batch: whether every rank must be given all ranks' tokens.
        gives_weight_gradient: whether the router weights' gradient is that of the weights as given.
    """

    needs_shared_batch: ClassVar[bool] = False
    gives_weight_gradient: ClassVar[bool] = True

    @classmethod
    def variants(cls) -> tuple[str, ...]:
        """Ways it knows."""
        return ("",)

    @classmethod
    def shares_batch(cls, variant: str) -> bool:
        """Whether this way needs all ranks' tokens on every rank."""
        return cls.needs_shared_batch

    @classmethod
    def why_not(cls, setting: DispatchBenchSetting, entry: Entry) -> str | None:
        """Why it cannot take part; None if it can."""
        return None

    @abstractmethod
    def __init__(self, material: Material) -> None:
        """Build it; every rank calls this in the same order."""

    @abstractmethod
    def __call__(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sums of expert outputs: [N, H]."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Gradient of each stacked tensor, this rank's experts in order of the layout."""

    @abstractmethod
    def clear(self) -> None:
        """Forget gradients."""

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Its own counters, where it has any."""
        return {}

    def phases(self, seconds: dict[str, float]) -> bool:
        """Add up where time goes from now on; False if it cannot tell."""
        return False


class ModulePeer(Peer):
    """A peer whose experts are one module."""

    experts: Any

    def gradients(self) -> dict[str, Tensor]:
        """See the base class."""
        return {name: p.grad for name, p in self.experts.named_parameters(recurse=False) if p.grad is not None}

    def clear(self) -> None:
        """See the base class."""
        self.experts.zero_grad(set_to_none=True)


PEERS = ("transformers", "ours", "deepspeed")


def peer_class(name: str) -> type[Peer]:
    """A peer by the name of its module."""
    found: type[Peer] = importlib.import_module(f"moekit.bench.dispatch.competitors.{name}").PEER
    return found


# Of ours, those whose rows depend on who owns what.
MOVED = ("once-per-expert", "once-per-rank", "hierarchical")


def all_entries(placements: Sequence[str] = (), routings: Sequence[str] = ("",)) -> tuple[Entry, ...]:
    """Every way of every peer, the baseline first; ours again with each placement and with other choices."""
    entries = [Entry(peer=name, variant=v) for name in PEERS for v in peer_class(name).variants()]
    for routing in routings:
        for placement in ("", *placements):
            if routing or placement:
                entries += [Entry(peer="ours", variant=v, placement=placement, routing=routing) for v in MOVED]
    return tuple(entries)
