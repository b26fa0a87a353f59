"""Every dispatcher of the catalogue."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moekit import catalogue
from moekit.bench.dispatch.competitors.base import Material, ModulePeer
from moekit.bench.dispatch.phases import Clock, time_dispatcher, time_experts
from moekit.bench.dispatch.setting import DispatchBenchSetting, Entry
from moekit.parallel.dispatcher import Dispatcher
from moekit.parallel.sharding import make_dispatcher
from moekit.parallel.traffic import Traffic

# "once-per-rank int8" sends hidden states in 8 bits on the way out.
_CODECS = ("int8",)


def _split(variant: str) -> tuple[str, Any]:
    name, _, codec = variant.partition(" ")
    return name, codec or "none"


class Ours(ModulePeer):
    """A dispatcher with one module of local experts."""

    @classmethod
    def variants(cls) -> tuple[str, ...]:
        """Names in the catalogue, what serves one shared batch last."""
        names = [record.name for record in catalogue.methods("dispatch")]
        return tuple(sorted(names, key=lambda name: (cls.shares_batch(name), name != "once-per-expert", name)))

    @classmethod
    def shares_batch(cls, variant: str) -> bool:
        """See the base class."""
        found = catalogue.get("dispatch", _split(variant)[0]).cls
        assert issubclass(found, Dispatcher)
        return found.needs_shared_batch

    @classmethod
    def why_not(cls, setting: DispatchBenchSetting, entry: Entry) -> str | None:
        """See the base class."""
        if setting.experts < setting.ranks and not entry.placement:
            return f"{setting.experts} experts are fewer than {setting.ranks} ranks"
        return None

    def __init__(self, material: Material) -> None:
        """See the base class."""
        self.experts = material.own_experts()
        name, codec = _split(material.entry.variant)
        self._dispatcher = make_dispatcher(name, material.layout, material.ranks, codec=codec)
        self._run: Any = self.experts

    def __call__(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """See the base class."""
        return self._dispatcher(x_NH, indices_NK, weights_NK, self._run)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """See the base class."""
        return self._dispatcher.traffic

    def phases(self, seconds: dict[str, float]) -> bool:
        """See the base class."""
        clock = Clock(seconds)
        time_dispatcher(self._dispatcher, clock)
        self._run = time_experts(self.experts, clock)
        return True


PEER = Ours
