"""C2R: collaboration-constrained routing (NAACL 2025, arXiv:2504.01337).

A token's first expert i* is chosen freely; experts 2..K come only from the T experts that fired most often together
with i* (its *partners*). T = E-1 is plain top-k, T = K-1 makes the whole choice a function of i*. Where partners lie on
one device, a token is sent to fewer devices.

Legend: T tokens, E experts, K choices a token, D devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.errors import BadConfig, BadData
from moekit.runtime.part import PlanInputs
from moekit.runtime.router import ChoosePart, Routed, RouteInputs


def partner_lists(coactivation_EE: Tensor) -> Tensor:
    """Rank all experts by how often they fired together with each expert (paper section 3.2).

    Args:
        coactivation_EE: symmetric counts; the diagonal is ignored.

    Returns:
        [E, E] int64, row i a permutation of 0..E-1: partners of i by falling count, ties by lowest index, i itself
        last.
    """
    counts_EE = coactivation_EE.to(torch.int64).clone()
    counts_EE.fill_diagonal_(-1)
    return counts_EE.argsort(dim=1, descending=True, stable=True)


def allowed_partners(lists_EE: Tensor, top_t: int) -> Tensor:
    """Which experts may be chosen beside each first expert: [E, E] bool, the diagonal always True."""
    experts = lists_EE.shape[0]
    allowed_EE = torch.zeros(experts, experts, dtype=torch.bool, device=lists_EE.device)
    allowed_EE.scatter_(1, lists_EE[:, :top_t].to(torch.int64), True)
    return allowed_EE.fill_diagonal_(True)


def allowed_devices(selection_TE: Tensor, device_E: Tensor, devices: int, limit: int) -> Tensor:
    """Experts on the token's best `limit` devices, a device being as good as its best expert: [T, E] bool.

    With devices as contiguous groups this is DeepSeek-V2's group-limited choice (arXiv:2405.04434, section 2.2.2).
    """
    best_TD = selection_TE.new_full((selection_TE.shape[0], devices), float("-inf"))
    index_TE = device_E.expand_as(selection_TE)
    best_TD = best_TD.scatter_reduce(1, index_TE, selection_TE, reduce="amax")
    chosen_TD = torch.zeros_like(best_TD, dtype=torch.bool)
    chosen_TD.scatter_(1, best_TD.topk(limit, dim=-1).indices, True)
    return chosen_TD.gather(1, index_TE)


@register(
    name="c2r",
    kind="routing",
    paper="arXiv:2504.01337",
    needs=("coactivation",),
    changes="routing",
    stock=False,
    limits=(
        "List mode does not load in stock transformers or vLLM as a policy: the folder opens there with plain top-k.",
        "On models whose experts already collaborate in groups, placement alone may do most of the work.",
    ),
)
class C2R(ChoosePart):
    """Experts 2..K of a token come from the `top_t` favourite partners of its first expert.

    With scores s over E experts and i* = argmax s, list mode chooses i* and the K-1 best of P_T(i*), the T experts
    with the largest co-activation count C[i*, j]. Device mode chooses the K best experts of the device that holds i*
    (of the best `max_devices` devices), so that a token reaches that many devices by construction. Weights are the
    family's own for the chosen experts ("host"; Qwen variant: not renormalised where the family does not), or a
    softmax over the chosen logits alone ("selected"; LLaMA-MoE variant). Choose it when tokens travel between devices
    and a short fine-tune is affordable; place the experts first and see what the constraint adds.
    """

    axes: ClassVar[Mapping[str, str]] = {"partners": "ER->E", "devices": "E"}

    top_t: int | None = Field(default=None, ge=1, description="partners a first expert may bring, K-1 to E-1 (list)")
    mode: Literal["list", "device"] = Field(default="list", description="constrain to partner lists or to devices")
    max_devices: int = Field(default=1, ge=1, description="devices a token may reach (device mode)")
    weights: Literal["host", "selected"] = Field(default="host", description="how the chosen experts are weighed")

    @model_validator(mode="after")
    def _fits_mode(self) -> C2R:
        if self.mode == "list" and self.top_t is None:
            raise ValueError("list mode needs top_t, from K-1 (strictest) to E-1 (plain top-k)")
        if self.mode == "device" and self.top_t is not None:
            raise ValueError("top_t belongs to list mode; device mode takes max_devices")
        return self

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[C2R]:
        """Strictest and loosest lists, both weights, and one device a token."""
        strict = max(geometry.top_k - 1, 1)
        return [
            cls(top_t=strict),
            cls(top_t=strict, weights="selected"),
            cls(top_t=geometry.experts - 1),
            cls(mode="device"),
        ]

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse T outside [K-1, E-1]: T = E would choose the first expert twice."""
        if self.top_t is None:
            return
        low, high = max(geometry.top_k - 1, 1), geometry.experts - 1
        if not low <= self.top_t <= high:
            raise BadConfig(
                f"top_t is {self.top_t}; with K = {geometry.top_k} of E = {geometry.experts} experts it must lie in "
                f"[{low}, {high}]",
                layer=layer,
                hint=f"the nearest legal value is {min(max(self.top_t, low), high)}",
            )

    def plan(self, inputs: PlanInputs) -> dict[str, Tensor]:
        """Partner lists [E, E] int16 (list mode), or the device of each expert [E] int16 (device mode)."""
        if self.mode == "device":
            return {"devices": self._devices(inputs)}
        counts_EE = inputs.statistics.get("coactivation")
        if counts_EE is None:
            raise BadData(
                "the trace has no co-activation counts",
                layer=inputs.layer,
                hint="profile again with them (the default)",
            )
        return {"partners": partner_lists(counts_EE).to(torch.int16)}

    def _devices(self, inputs: PlanInputs) -> Tensor:
        if inputs.devices is None:
            raise BadConfig(
                "device mode needs to know which device holds which expert",
                layer=inputs.layer,
                hint="give a placement (moekit place), or say --mode list",
            )
        devices_E = torch.tensor(inputs.devices, dtype=torch.int16)
        smallest = int(torch.bincount(devices_E.long()).min()) * self.max_devices
        if smallest < inputs.geometry.top_k:
            raise BadConfig(
                f"{self.max_devices} device(s) may hold only {smallest} experts, but a token takes "
                f"{inputs.geometry.top_k}",
                layer=inputs.layer,
                hint="place on fewer devices, or raise max_devices",
            )
        return devices_E

    def prepare(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """The mask that `route` indexes by first expert (list mode), or devices as indices (device mode)."""
        name, sizes = ("devices", 1) if self.mode == "device" else ("partners", 2)
        stored = tensors[name]
        if stored.shape != (geometry.experts,) * sizes or stored.is_floating_point():
            raise ValueError(f"{name} is {stored.dtype} of shape {list(stored.shape)}")
        if bool(((stored < 0) | (stored >= geometry.experts)).any()):
            raise ValueError(f"{name} outside 0 to {geometry.experts - 1}")
        if self.top_t is None:
            return {"devices": stored.to(torch.int64)}
        return {"allowed": allowed_partners(stored, self.top_t)}

    def choose(self, inputs: RouteInputs) -> Routed:
        """Constrained top-k (paper section 3.3); same in training and inference."""
        gate, logits_TE, constants = inputs.gate, inputs.logits, inputs.constants
        selection_TE = gate.selection(logits_TE)
        first_T = gate.first(selection_TE)
        if self.mode == "device":
            devices_E = constants["devices"]
            count = int(devices_E.max()) + 1
            # The first choice brings its device along, also where another device's best expert ties with it.
            ranked_TE = selection_TE.scatter(1, first_T.unsqueeze(1), float("inf"))
            allowed_TE = allowed_devices(ranked_TE, devices_E, count, min(self.max_devices, count))
        else:
            allowed_TE = constants["allowed"][first_T]
        indices_TK = gate.choose_allowed(logits_TE, first_T, allowed_TE)
        if self.weights == "selected":
            chosen_TK = logits_TE.gather(1, indices_TK)
            return Routed(chosen_TK.softmax(dim=-1, dtype=torch.float32) * gate.spec.scale, indices_TK)
        return Routed(gate.weigh(logits_TE, indices_TK), indices_TK)
