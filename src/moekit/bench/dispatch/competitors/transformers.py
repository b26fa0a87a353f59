"""transformers' own expert parallelism, through its classes: `all_to_all` (training) and `all_reduce` (one batch)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moekit.bench.dispatch.competitors.base import Material, ModulePeer
from moekit.bench.dispatch.phases import Clock, time_experts
from moekit.bench.dispatch.setting import DispatchBenchSetting, Entry

_meshes: dict[int, DeviceMesh] = {}


def _mesh(ranks: int) -> DeviceMesh:
    """Ranks that share experts by ranks that share a batch; made once, as all ranks do it together."""
    if ranks not in _meshes:
        _meshes[ranks] = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    return _meshes[ranks]


class Transformers(ModulePeer):
    """The classes that transformers registers under `ep_implementation`."""

    @classmethod
    def variants(cls) -> tuple[str, ...]:
        """Ways it knows."""
        return ("all_to_all", "all_reduce")

    @classmethod
    def shares_batch(cls, variant: str) -> bool:
        """See the base class."""
        return variant == "all_reduce"

    @classmethod
    def why_not(cls, setting: DispatchBenchSetting, entry: Entry) -> str | None:
        """See the base class."""
        try:
            import transformers.distributed.expert_parallel  # noqa: F401
        except ImportError:
            return "this version of transformers has no expert parallelism that can be called"
        if setting.experts % setting.ranks:
            return f"{setting.experts} experts cannot be dealt evenly to {setting.ranks} ranks"
        return "it knows contiguous blocks only" if entry.placement else None

    def __init__(self, material: Material) -> None:
        """See the base class."""
        from transformers.distributed.expert_parallel import EPImplementationInterface

        self.experts = material.own_experts()
        mesh = _mesh(material.setting.ranks)
        shared = material.entry.variant == "all_reduce"
        make: Any = EPImplementationInterface()[material.entry.variant]
        self._forward: Any = make(self.experts, mesh["ep"], mesh["ep"] if shared else mesh["tp"])

    def __call__(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """See the base class."""
        y_NH: Tensor = self._forward(x_NH, indices_NK, weights_NK)
        return y_NH

    def phases(self, seconds: dict[str, float]) -> bool:
        """See the base class: its experts only; the rest is told by operation."""
        self._forward.experts_forward = time_experts(self._forward.experts_forward, Clock(seconds))
        return True


PEER = Transformers
