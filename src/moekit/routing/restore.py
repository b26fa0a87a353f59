"""Carry a policy in a checkpoint's two extra files: into the record on save, back into the model on load."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.model import RESTORERS
from moekit.checkpoint.record import PolicyEntry, Record
from moekit.errors import BadCheckpoint
from moekit.routing.attach import active_policy
from moekit.routing.plan import PlanHeader, RoutingPlan, make_policy

_PREFIX = "routing"


def policy_entry(model: nn.Module, name: str) -> tuple[PolicyEntry, dict[str, Tensor]] | None:
    """What a model's policy leaves in the record and in `moekit.safetensors`; None with stock routing."""
    active = active_policy(model)
    if active is None:
        return None
    policy, layers = active
    entry = PolicyEntry(name=name, config=policy.model_dump(mode="json"), layers=sorted(layers))
    tensors = {f"{_PREFIX}.{layer}.{key}": t.cpu() for layer, named in layers.items() for key, t in named.items()}
    return entry, tensors


def restore_policy(model: nn.Module, record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Attach the policy that a record names.

    Raises:
        BadCheckpoint: a layer of the record is missing in the model.
        BadConfig: the policy is unknown here, or its tensors do not fit.
    """
    if record.policy is None:
        return
    experts = {layer.index: layer.geometry.experts for layer in find_moe_layers(model)}
    missing = [layer for layer in record.policy.layers if layer not in experts]
    if missing:
        raise BadCheckpoint(
            f"the record routes layers {missing} by {record.policy.name!r}, but they are no MoE layers",
            hint="moekit.json belongs to another model: load with policy=False for stock routing",
        )
    named: dict[int, dict[str, Tensor]] = {layer: {} for layer in record.policy.layers}
    for key, tensor in tensors.items():
        prefix, _, rest = key.partition(".")
        layer, _, name = rest.partition(".")
        if prefix != _PREFIX:
            continue
        if not layer.isdecimal() or int(layer) not in named or not name:
            raise BadCheckpoint(
                f"a tensor {key!r} of the routing policy belongs to no layer that it routes",
                hint="moekit.safetensors belongs to another model: load with policy=False for stock routing",
            )
        named[int(layer)][name] = tensor
    header = PlanHeader(
        policy=record.policy.name,
        config=record.policy.config,
        layers=record.policy.layers,
        experts=[experts[layer] for layer in record.policy.layers],
    )
    make_policy(header.policy, header.config)
    RoutingPlan(header, named).apply(model)


RESTORERS.append(restore_policy)
