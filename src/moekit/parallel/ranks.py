"""Which ranks share experts, which share a node, and which hold equal experts: process groups from one mesh.

Legend: W world size, R ranks that share the experts, M nodes among them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moekit.errors import BadConfig

COPIES, NODE, PLACE = "copies", "node", "place"


@dataclass(eq=False)
class _Made:
    """Meshes made over one default process group: their groups hold threads and sockets until that group goes.

    Attributes:
        world: that group; meshes over one that is gone are forgotten.
        meshes: by sizes and device type.
    """

    world: dist.ProcessGroup | None = None
    meshes: dict[tuple[str, tuple[int, int, int]], DeviceMesh] = field(default_factory=dict)


_made = _Made()


@dataclass(frozen=True, eq=False)
class Ranks:
    """Process groups of expert parallelism.

    Attributes:
        group: the R ranks among which the experts of a layer are dealt out.
        across: of them, those with one's own place in every node; None where nodes are not told apart.
        inside: of them, those of one's own node.
        copies: ranks that own the same experts as this one; None if it is alone.
    """

    group: dist.ProcessGroup
    across: dist.ProcessGroup | None = None
    inside: dist.ProcessGroup | None = None
    copies: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """R."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Own place among the R."""
        return dist.get_rank(self.group)

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Ranks:
        """From a mesh: one dimension (all ranks share the experts), or dimensions called copies, node and place.

        Raises:
            BadConfig: other dimensions.
        """
        names = mesh.mesh_dim_names or ()
        if mesh.ndim == 1:
            return cls(mesh.get_group())
        if set(names) - {COPIES, NODE, PLACE} or PLACE not in names:
            raise BadConfig(
                f"a mesh with dimensions {names or mesh.ndim} does not say which ranks share experts",
                hint=f"name them {COPIES!r} (ranks with equal experts), {NODE!r} and {PLACE!r}; see expert_mesh()",
            )
        copies = mesh[COPIES].get_group() if COPIES in names and mesh[COPIES].size() > 1 else None
        if NODE not in names:
            return cls(mesh[PLACE].get_group(), copies=copies)
        both = mesh[NODE, PLACE]._flatten()
        return cls(both.get_group(), mesh[NODE].get_group(), mesh[PLACE].get_group(), copies)


def expert_mesh(ranks: int | None = None, nodes: int = 1, device_type: str | None = None) -> DeviceMesh:
    """A mesh over the whole world: copies x nodes x places.

    Neighbouring ranks share the experts, and among them neighbouring ranks share a node, as torchrun numbers them.
    Calls with equal sizes get the same mesh, since process groups stay until the default group is destroyed.

    Args:
        ranks: R; all by default.
        nodes: M among them.
        device_type: "cpu" or "cuda"; what the default process group serves, by default.

    Raises:
        BadConfig: R does not divide the world, or M does not divide R.
    """
    if not dist.is_initialized():
        raise BadConfig("there is no process group", hint="start under torchrun and call start_ranks() first")
    world = dist.get_world_size()
    size = ranks or world
    if world % size:
        raise BadConfig(f"{world} ranks cannot be dealt into groups of {size}", hint=f"--ep must divide {world}")
    if size % nodes:
        raise BadConfig(f"{size} ranks cannot stand in {nodes} nodes of equal size", hint="choose a divisor")
    kind = device_type or ("cuda" if "nccl" in dist.get_backend_config() else "cpu")
    if _made.world is not dist.group.WORLD:
        _made.world, _made.meshes = dist.group.WORLD, {}
    sizes = (world // size, nodes, size // nodes)
    if (kind, sizes) not in _made.meshes:
        _made.meshes[kind, sizes] = init_device_mesh(kind, sizes, mesh_dim_names=(COPIES, NODE, PLACE))
    return _made.meshes[kind, sizes]


def node_count() -> int:
    """Nodes of the whole world as torchrun told: world size over ranks of this node."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    world = dist.get_world_size() if dist.is_initialized() else 1
    return world // local if local and world % local == 0 else 1


def device_of(mesh: DeviceMesh) -> torch.device:
    """Where this rank computes."""
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)
