"""What ranks are asked to do in tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.errors import UnsupportedModel
from moekit.parallel import sharding
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.ranks import Ranks, expert_mesh
from moekit.placement import Placement
from tests.families import build


def identity(ranks: Ranks, dispatch: str, owner: list[int], indices: list[Tensor], seed: int) -> dict[str, Any]:
    """Dispatch and combine with experts that return their input, weights summing to one; forward and backward."""
    layout = ExpertLayout.make(owner, ranks.size)
    dispatcher = sharding.make_dispatcher(dispatch, layout, ranks)
    indices_NK = indices[ranks.rank]
    generator = torch.Generator().manual_seed(seed + ranks.rank)
    x_NH = torch.randn(len(indices_NK), 12, generator=generator, dtype=torch.float64).requires_grad_()
    weights_NK = torch.rand(indices_NK.shape, generator=generator, dtype=torch.float64)
    valid_NK = indices_NK < layout.experts
    weights_NK = (weights_NK * valid_NK / (weights_NK * valid_NK).sum(1, keepdim=True)).nan_to_num()

    def run(rows_QH: Tensor, local_QS: Tensor, weights_QS: Tensor) -> Tensor:
        return rows_QH * (weights_QS * (local_QS < layout.counts[ranks.rank])).sum(1, keepdim=True)

    y_NH = dispatcher(x_NH, indices_NK, weights_NK, run)
    y_NH.sum().backward()
    assert x_NH.grad is not None
    return {
        "x": x_NH.detach(),
        "y": y_NH.detach(),
        "grad": x_NH.grad,
        "rows": {name: dict(t.rows) for name, t in dispatcher.traffic.items()},
        "bytes": {name: t.total_bytes() for name, t in dispatcher.traffic.items()},
    }


def model_step(
    ranks: Ranks,
    family: str,
    dispatch: str,
    tokens: Tensor,
    *,
    placement: Placement | None = None,
    policy: bool = False,
    overrides: dict[str, Any] | None = None,
    codec: str = "none",
) -> dict[str, Any]:
    """Logits, loss and gradients of a tiny model on this rank's rows, with its experts dealt out."""
    model = tiny(family, policy, overrides)
    shared = catalogue.get("dispatch", dispatch).cls.needs_shared_batch
    sharding.expert_parallel(
        model,
        ranks,
        dispatch=dispatch,
        placement=placement,
        shared_batch=shared,
        codec=codec,  # type: ignore[arg-type]
    )
    mine = tokens if shared else tokens[ranks.rank :: ranks.size]
    return step(model, mine) | {
        "traffic": [
            {name: (dict(t.rows), t.total_bytes()) for name, t in shard.dispatcher.traffic.items()}
            for shard in sharding.shards(model)
        ],
        "owned": {shard.name: shard.owned for shard in sharding.shards(model)},
    }


def tiny(family: str, policy: bool = False, overrides: dict[str, Any] | None = None) -> Any:
    """A tiny model, with C2R where asked."""
    model = build(family, **(overrides or {})).eval()
    if policy:
        from moekit.routing import plan_routing
        from moekit.routing.methods.c2r import C2R

        layers = find_moe_layers(model)
        generator = torch.Generator().manual_seed(0)
        experts = layers[0].geometry.experts
        counts = {layer.index: torch.randint(0, 50, (experts, experts), generator=generator) for layer in layers}
        statistics = {index: {"coactivation": c + c.T, "load": c.sum(0)} for index, c in counts.items()}
        chosen = C2R(top_t=max(2, layers[0].geometry.top_k))
        plan_routing(layers, chosen, "c2r", statistics).apply(model)
    return model


def step(model: Any, tokens: Tensor) -> dict[str, Any]:
    """Forward, a loss that sums over tokens, backward."""
    model.zero_grad()
    out = model(input_ids=tokens, use_cache=False)
    logits = out.logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": float(loss.detach()), "grads": grads}


def hook_routers(model: Any, what: str) -> None:
    """Hang hooks on all routers that change the indices chosen, or their weights alone."""
    for layer in find_moe_layers(model):

        def hook(_: Any, __: Any, answer: Any, experts: int = layer.geometry.experts) -> Any:
            logits, weights, indices = answer
            return (logits, weights, (indices + 1) % experts) if what == "indices" else (logits, weights / 2, indices)

        layer.require_router().register_forward_hook(hook)


def hooked_step(ranks: Ranks, family: str, what: str, tokens: Tensor) -> Tensor | str:
    """Logits of a model whose routers are hooked, or why it is refused."""
    model = tiny(family)
    hook_routers(model, what)
    sharding.expert_parallel(model, ranks)
    try:
        return step(model, tokens[ranks.rank :: ranks.size])["logits"]
    except UnsupportedModel as error:
        return str(error)


def meshes(ranks: Ranks) -> tuple[bool, int]:
    """Whether equal calls give one mesh, and process groups that twenty further calls make."""
    first, other = expert_mesh(2), expert_mesh(4, nodes=2)
    Ranks.of(other)
    made = len(dist.distributed_c10d._world.pg_map)
    again = [(expert_mesh(2), expert_mesh(4, nodes=2)) for _ in range(10)]
    for pair in again:
        Ranks.of(pair[1])
    return all(pair == (first, other) for pair in again), len(dist.distributed_c10d._world.pg_map) - made


def regathered(ranks: Ranks, family: str, placement: Placement) -> bool:
    """Whether dealing out and gathering gives the same weights back."""
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    sharding.expert_parallel(model, ranks, placement=placement)
    sharding.gather_experts(model)
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
