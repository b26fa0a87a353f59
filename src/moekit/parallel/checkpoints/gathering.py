"""A whole model's weights from all ranks, tensor by tensor, on the first one alone.

Legend: E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.parallel.sharding import ExpertShard, all_parts, shards


@torch.no_grad()
def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names of the whole model, experts in logical order, on the CPU of rank 0.

    All ranks call it; at any time the others hold one whole tensor at most.

    Args:
        model: experts dealt out by `expert_parallel`; the rest whole on every rank, or dealt out by FSDP2.

    Returns:
        Name -> tensor on rank 0; empty elsewhere.
    """
    own = {f"{shard.name}.{name}": shard for shard in shards(model) for name in shard.stacked}
    keep = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        whole = _logical(tensor, own[name]) if name in own else _whole(tensor)
        if keep:
            state[name] = whole.to("cpu", copy=True)
    return state


def _logical(tensor: Tensor, shard: ExpertShard) -> Tensor:
    parts = all_parts(tensor.detach(), shard)
    order = torch.cat([shard.layout.owned(rank) for rank in range(shard.layout.ranks)])
    whole = torch.empty_like(parts)
    whole[order] = parts
    return whole


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
