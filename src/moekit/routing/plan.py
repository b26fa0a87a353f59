"""A routing plan: what a policy decided for each layer, with the scores it decided from.

On disk a folder: `plan.json` (policy, knobs, which model and trace it came from, figures a person can read) and
`plan.safetensors` (the policy's tensors and the statistics it used, so that another T needs no new trace).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from moekit import catalogue
from moekit._progress import Progress, track
from moekit._validation import parse_file
from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.checkpoint.atomic import atomic_folder
from moekit.checkpoint.safety import load_tensors
from moekit.errors import BadCheckpoint, BadConfig, BadData
from moekit.runtime.attachment import attach, detach, reattach
from moekit.runtime.part import PlanInputs, RuntimePart
from moekit.runtime.router import ChoosePart, RouterPart

PLAN_FILE = "plan.json"
PLAN_TENSORS = "plan.safetensors"
MAX_PLAN_BYTES = 16 << 20
_AGAIN = "plan the routing again"


class PlanHeader(BaseModel):
    """The readable part of a plan.

    Attributes:
        format: version of this file.
        policy: name in the catalogue.
        config: the policy's knobs.
        fingerprint: of the model it was made for, "" if unknown.
        trace: hash of the trace it was made from, "" without.
        layers: decoder layers it covers.
        experts: E of each of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    policy: str
    config: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str = ""
    trace: str = ""
    layers: list[int]
    experts: list[int]

    @model_validator(mode="after")
    def _check(self) -> PlanHeader:
        if len(self.layers) != len(self.experts):
            raise ValueError(f"{len(self.layers)} layers, but experts of {len(self.experts)}")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("a layer is planned twice")
        return self


class RoutingPlan:
    """A policy with its tensors for every layer.

    Args:
        header: the readable part.
        tensors: decoder layer -> name -> tensor, from the policy's `plan`.
        scores: decoder layer -> name -> statistic it decided from.
    """

    def __init__(
        self,
        header: PlanHeader,
        tensors: Mapping[int, Mapping[str, Tensor]],
        scores: Mapping[int, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.header = header
        self.tensors = {layer: dict(named) for layer, named in tensors.items()}
        self.scores = {layer: dict(named) for layer, named in (scores or {}).items()}

    @property
    def policy(self) -> RouterPart:
        """The policy object, made from name and knobs."""
        return make_policy(self.header.policy, self.header.config)

    @property
    def hash(self) -> str:
        """sha256 over policy, knobs and tensors: two plans with equal hashes route alike."""
        digest = hashlib.sha256(json.dumps([self.header.policy, self.header.config], sort_keys=True).encode())
        for layer in sorted(self.tensors):
            for name, tensor in sorted(self.tensors[layer].items()):
                digest.update(f"{layer}.{name}.{tensor.dtype}.{tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the plan as a folder, whole or not at all."""
        flat = {f"layers.{layer}.{name}": t for layer, named in self.tensors.items() for name, t in named.items()}
        flat |= {f"scores.{layer}.{name}": t for layer, named in self.scores.items() for name, t in named.items()}
        with atomic_folder(Path(folder), overwrite=overwrite) as temporary:
            (temporary / PLAN_FILE).write_text(self.header.model_dump_json(indent=2) + "\n")
            safetensors.torch.save_file({n: t.contiguous() for n, t in flat.items()}, temporary / PLAN_TENSORS)

    @classmethod
    def load(cls, folder: str | Path) -> RoutingPlan:
        """Read a plan.

        Raises:
            BadData: not a plan, or damaged.
        """
        folder = Path(folder)
        file = folder / PLAN_FILE
        missing = "`moekit route` writes one"
        header = parse_file(PlanHeader, file, what="routing plan", missing=missing, hint=_AGAIN, limit=MAX_PLAN_BYTES)
        parts = _read_parts(folder / PLAN_TENSORS, header.layers)
        tensors = {layer: parts["layers"].get(layer, {}) for layer in header.layers}
        return cls(header, tensors, parts["scores"])

    def with_config(self, **changes: Any) -> RoutingPlan:
        """The same tensors under other knobs (another T), without a new trace.

        Raises:
            BadConfig: the policy refuses the knobs.
        """
        config = {**self.header.config, **changes}
        make_policy(self.header.policy, config)
        return RoutingPlan(self.header.model_copy(update={"config": config}), self.tensors, self.scores)

    def permuted(self, orders: Mapping[int, Sequence[int]]) -> RoutingPlan:
        """The plan for a model whose experts were reordered, `order[new] = old`; its fingerprint is dropped."""
        policy = self.policy
        try:
            tensors = {
                layer: policy.permute(named, orders[layer]) if layer in orders else named
                for layer, named in self.tensors.items()
            }
        except (LookupError, RuntimeError, TypeError) as error:
            raise BadData(f"damaged routing plan: {error!r}", hint=_AGAIN) from error
        return RoutingPlan(self.header.model_copy(update={"fingerprint": ""}), tensors)

    def apply(self, model: nn.Module, *, fingerprint: str = "") -> None:
        """Make a live model route by this plan, whole or not at all.

        It replaces what was attached by an earlier plan of the same policy and, if it chooses, whatever chose before;
        parts of other stages stay and compose with it.

        Args:
            model: the model.
            fingerprint: the model's, compared with the plan's where both are known.

        Raises:
            BadConfig: the plan was made for another model, or lacks tensors. The model routes as before.
        """
        if self.header.fingerprint and fingerprint and fingerprint != self.header.fingerprint:
            raise BadConfig(
                f"this plan was made for model {self.header.fingerprint[:12]}, not {fingerprint[:12]}",
                hint="profile and plan this model, or drop the plan's fingerprint if you know they match",
            )
        layers = {layer.index: layer for layer in find_moe_layers(model)}
        for index, experts in zip(self.header.layers, self.header.experts, strict=True):
            if index not in layers or layers[index].geometry.experts != experts:
                raise BadConfig(
                    f"the plan expects a MoE layer of {experts} experts here",
                    layer=index,
                    hint=f"the model has MoE layers {sorted(layers)}; the plan belongs to another model",
                )
        policy = self.policy

        def gives_way(other: RuntimePart) -> bool:
            return type(other) is type(policy) or (isinstance(other, ChoosePart) and isinstance(policy, ChoosePart))

        replaced = detach(model, "router", only=gives_way)
        try:
            attach(model, policy, {index: self.tensors[index] for index in self.header.layers})
        except BaseException:
            for attachment in replaced:
                reattach(model, attachment)
            raise


def _read_parts(file: Path, layers: Sequence[int]) -> dict[str, dict[int, dict[str, Tensor]]]:
    """Tensors and scores of a plan's layers.

    Raises:
        BadData: missing, damaged, or of other layers.
    """
    try:
        tensors = load_tensors(file)
    except BadCheckpoint as error:
        raise BadData(f"damaged routing plan: {error.message}", file=file, hint=_AGAIN) from error
    known = {str(layer) for layer in layers}
    parts: dict[str, dict[int, dict[str, Tensor]]] = {"layers": {}, "scores": {}}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        layer, _, name = rest.partition(".")
        if kind not in parts or layer not in known or not name:
            raise BadData(f"damaged routing plan: a tensor {key!r} that no layer of it has", file=file, hint=_AGAIN)
        parts[kind].setdefault(int(layer), {})[name] = tensor
    return parts


def make_policy(name: str, config: Mapping[str, Any]) -> RouterPart:
    """A policy from its catalogue name and knobs.

    Raises:
        BadConfig: unknown name, or knobs it refuses.
    """
    policy: RouterPart = catalogue.make("routing", name, config)
    return policy


def plan_routing(
    layers: Sequence[MoELayer],
    policy: RouterPart,
    name: str,
    statistics: Mapping[int, Mapping[str, Tensor]] | None = None,
    *,
    devices: Mapping[int, Sequence[int]] | None = None,
    fingerprint: str = "",
    trace: str = "",
    progress: Progress | None = None,
) -> RoutingPlan:
    """Let a policy plan every layer.

    Args:
        layers: from `find_moe_layers`.
        policy: the policy.
        name: its catalogue name.
        statistics: decoder layer -> named statistics of a trace.
        devices: decoder layer -> device of each expert, from a placement.
        fingerprint: the model's.
        trace: the trace's hash.
        progress: told once a layer.

    Returns:
        The plan, statistics kept as its scores.
    """
    needs = catalogue.get("routing", name).needs
    tensors: dict[int, dict[str, Tensor]] = {}
    scores: dict[int, dict[str, Tensor]] = {}
    for layer in track(layers, f"planning {name}", progress):
        policy.check(layer.geometry, layer.index)
        known = (statistics or {}).get(layer.index, {})
        inputs = PlanInputs(layer.index, layer.geometry, known, (devices or {}).get(layer.index))
        tensors[layer.index] = policy.plan(inputs)
        scores[layer.index] = {need: known[need] for need in needs if need in known}
    header = PlanHeader(
        policy=name,
        config=policy.model_dump(mode="json"),
        fingerprint=fingerprint,
        trace=trace,
        layers=[layer.index for layer in layers],
        experts=[layer.geometry.experts for layer in layers],
    )
    return RoutingPlan(header, tensors, scores)
