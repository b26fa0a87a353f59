"""moekit's dispatchers as values of transformers' own switch.

>>> import moekit.parallel.transformers_ep
>>> config = DistributedConfig(fsdp_size=4, ep_size=4, ep_implementation="moekit_once_per_rank")
>>> model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)

Importing this module registers them: `moekit_` and the dispatcher's name with underscores. Experts lie as transformers
deals them out, in equal blocks; for a placement of one's own, place the checkpoint first (`moekit place --model`).
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moekit import catalogue
from moekit.errors import BadConfig
from moekit.parallel.dispatcher import Dispatcher, DispatchOptions
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.link import Link
from moekit.parallel.ranks import Ranks, device_of
from moekit.parallel.shared_batch import SharedBatch

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError as error:
    raise BadConfig(
        "this transformers has no EPImplementationInterface, so its own switch cannot name other dispatchers",
        hint="upgrade transformers, or call moekit.parallel.expert_parallel(model, mesh)",
    ) from error

PREFIX = "moekit_"


class _MoekitEP(EPImplementation):  # type: ignore[misc]
    """One of our dispatchers in place of transformers' exchange."""

    dispatcher_class: type[Dispatcher]

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        ranks = _ranks(ep_mesh)
        layout = ExpertLayout.contiguous(self.num_local_experts * ranks.size, ranks.size, device_of(ep_mesh))
        self.dispatcher = self.dispatcher_class.over(layout, ranks, DispatchOptions())
        if tp_mesh.size() > 1 and not self.dispatcher.needs_shared_batch:
            self.dispatcher = SharedBatch.sharing(self.dispatcher, Link(tp_mesh.get_group()))

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.dispatcher(hidden_states, top_k_index, top_k_weights, self.experts_forward)


_nodes: dict[tuple[int, ...], tuple[Any, Any]] = {}


def _ranks(mesh: DeviceMesh) -> Ranks:
    """The mesh's group, and its parts by node where torchrun's ranks of one node divide it."""
    group = mesh.get_group()
    members = tuple(dist.get_process_group_ranks(group))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if not local or len(members) <= local or len(members) % local or members != tuple(range(len(members))):
        return Ranks(group)
    if members not in _nodes:
        nodes = [members[start : start + local] for start in range(0, len(members), local)]
        inside = [dist.new_group(list(node)) for node in nodes]
        across = [dist.new_group([node[place] for node in nodes]) for place in range(local)]
        place = dist.get_rank(group)
        _nodes[members] = across[place % local], inside[place // local]
    return Ranks(group, *_nodes[members])


def register() -> list[str]:
    """Enter every dispatcher of the catalogue into transformers' registry; their names there."""
    names = []
    for record in catalogue.methods("dispatch"):
        name = PREFIX + record.name.replace("-", "_")
        needs = record.cls.needs_shared_batch  # type: ignore[attr-defined]
        members = {"dispatcher_class": record.cls, "needs_shared_batch": needs, "__doc__": record.summary}
        EPImplementationInterface.register(name, type(record.cls.__name__ + "EP", (_MoekitEP,), members))
        names.append(name)
    return names


register()
