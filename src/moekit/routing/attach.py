"""Put a routing policy into a live model, and take it out again.

The router object stays: its class is replaced by a subclass of the stock class (as torch's `fully_shard` does), whose
forward runs the stock forward for the logits and then lets the policy choose. So parameter names, `state_dict`,
`output_router_logits`, hooks and optimizers see the same module, and what is saved is a stock checkpoint. The policy's
tensors are buffers that are not saved with the weights; they live in the two extra files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.errors import BadConfig
from moekit.routing.gate import Gate, identify_gate
from moekit.routing.policy import RoutingPolicy

_BUFFER = "_moekit_"


class PolicyRouter(nn.Module):
    """Mixin that routes by a policy; combined with the stock router class by `attach_policy`."""

    _moekit_policy: RoutingPolicy
    _moekit_gate: Gate
    _moekit_layer: int
    _moekit_stored: dict[str, Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Stock logits, the policy's weights and indices."""
        logits_TE, weights_TK, _ = super().forward(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        tensors = {name: getattr(self, _BUFFER + name) for name in self._moekit_names()}
        chosen_TK, indices_TK = self._moekit_policy.route(
            self._moekit_gate, logits_TE, tensors, hidden.reshape(-1, hidden.shape[-1])
        )
        return logits_TE, chosen_TK.to(weights_TK.dtype), indices_TK

    def _moekit_names(self) -> list[str]:
        return [name[len(_BUFFER) :] for name in self._buffers if name.startswith(_BUFFER)]


def _policy_class(stock: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a stock router class, made once per class and kept on it."""
    known = stock.__dict__.get("_moekit_policy_class")
    if known is None:
        known = type(f"Policy{stock.__name__}", (PolicyRouter, stock), {"_moekit_stock": stock})
        stock._moekit_policy_class = known  # type: ignore[attr-defined]
    assert isinstance(known, type)
    return known


def attach_policy(layer: MoELayer, policy: RoutingPolicy, tensors: Mapping[str, Tensor]) -> None:
    """Make one layer route by a policy; a policy already there is replaced.

    Args:
        layer: from `find_moe_layers`.
        policy: the policy.
        tensors: what its `plan` returned for this layer.

    Raises:
        BadConfig: the policy's knobs or tensors do not fit this layer.
        UnsupportedModel: the router or its gate does not follow the contract.
    """
    router = layer.require_router()
    _detach(layer, router)
    policy.check(layer.geometry, layer.index)
    for name, tensor in tensors.items():
        if layer.geometry.experts not in tensor.shape:
            raise BadConfig(
                f"the policy's tensor {name!r} of shape {tuple(tensor.shape)} is not made for "
                f"{layer.geometry.experts} experts",
                layer=layer.index,
                hint="the plan belongs to another model",
            )
    ready = _prepared(layer, policy, tensors)
    gate = Gate(identify_gate(layer), router)
    device = next(router.parameters()).device
    router.__class__ = _policy_class(type(router))
    _let_choose_none(layer.experts, True)
    # Plain attributes: nn.Module must not register the policy or the gate (which points back at the router).
    for name, value in (
        ("_moekit_policy", policy),
        ("_moekit_gate", gate),
        ("_moekit_layer", layer.index),
        ("_moekit_stored", dict(tensors)),
    ):
        object.__setattr__(router, name, value)
    for name, tensor in ready.items():
        router.register_buffer(_BUFFER + name, tensor.to(device), persistent=False)


def _prepared(layer: MoELayer, policy: RoutingPolicy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the policy makes of its stored tensors, before anything of the router is changed.

    Raises:
        BadConfig: the tensors are not those that the policy stores.
    """
    try:
        return policy.prepare(tensors, layer.geometry)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise BadConfig(
            f"the tensors are not what {type(policy).__name__} stores: {reason}",
            layer=layer.index,
            hint="the plan is damaged or belongs to another policy; plan the routing again",
        ) from error


def _let_choose_none(experts: nn.Module, wanted: bool) -> None:
    """Make transformers' grouped kernel skip the index E: without this flag it leaves NaN there.

    Experts that are spread over ranks keep it.
    """
    if hasattr(experts, "_is_expert_parallel") and not hasattr(experts, "experts_in_layer"):
        object.__setattr__(experts, "_is_expert_parallel", wanted)


def _detach(layer: MoELayer, router: nn.Module) -> None:
    if not isinstance(router, PolicyRouter):
        return
    _let_choose_none(layer.experts, False)
    for name in [n for n in router._buffers if n.startswith(_BUFFER)]:
        delattr(router, name)
    router.__class__ = type(router)._moekit_stock  # type: ignore[attr-defined]
    for name in ("_moekit_policy", "_moekit_gate", "_moekit_layer", "_moekit_stored"):
        object.__delattr__(router, name)


def detach_policy(model: nn.Module) -> None:
    """Give every layer its stock routing back."""
    for layer in find_moe_layers(model):
        if layer.router is not None:
            _detach(layer, layer.router)


def active_policy(model: nn.Module) -> tuple[RoutingPolicy, dict[int, dict[str, Tensor]]] | None:
    """The policy a model routes by and its stored tensors by layer; None with stock routing.

    Raises:
        BadConfig: layers route by different policies.
    """
    found: dict[int, PolicyRouter] = {}
    for layer in find_moe_layers(model):
        if isinstance(layer.router, PolicyRouter):
            found[layer.index] = layer.router
    if not found:
        return None
    policies = [router._moekit_policy for router in found.values()]
    if any(policy != policies[0] for policy in policies):
        raise BadConfig("layers route by different policies", hint="attach one policy, or save the layers' plans apart")
    return policies[0], {index: router._moekit_stored for index, router in found.items()}
