"""What is known of one MoE block of a live model.

Legend: T tokens, H hidden size, E routed experts, K choices a token, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from moekit.anatomy.asking import ask_router
from moekit.anatomy.choices import Seam
from moekit.anatomy.storage import Storage
from moekit.errors import UnsupportedModel


@dataclass(frozen=True)
class Geometry:
    """Sizes and layout of one MoE layer.

    Attributes:
        hidden: H, model width.
        experts: E, routed experts.
        top_k: K, choices a token (0 where no router follows the contract).
        width: I, inner width of one routed expert.
        shared_width: inner width of all shared experts together, 0 without.
        has_gate: gated expert (gate and up projection) or up projection only.
        has_bias: projections carry biases.
        transposed: weights stored [E, in, out] instead of [E, out, in].
        concatenated: gate rows first, then up rows; False when they alternate.
        weighs_inputs: a choice's weight multiplies what the expert is given rather than what it gives.
    """

    hidden: int
    experts: int
    top_k: int
    width: int
    shared_width: int
    has_gate: bool
    has_bias: bool
    transposed: bool
    concatenated: bool
    weighs_inputs: bool = False


@dataclass(eq=False)
class MoELayer:
    """One MoE block of a live model.

    Attributes:
        index: index of the decoder layer it belongs to.
        name: module path of the block.
        block: module that holds router, experts and shared experts.
        router: follows the router contract; None where the family's router does not.
        router_name: module path of the router, "" without.
        experts: follows the experts contract.
        experts_name: module path of the experts.
        shared: shared experts of the block.
        geometry: sizes and layout.
        storage: where the experts' weights lie.
        passed: tensors of the block that its router is given behind the hidden states, by name.
        seam: where choices can be read: at the "experts" (the contract), or in what the chooser answers.
        chooser: what answers them there, router or not; None where nothing was found.
        scored: what it scores: E, and more where it also scores what is no routed expert (a skip, say).
        siblings: module paths of MoE blocks of the same decoder layer that text does not run through: for images.
    """

    index: int
    name: str
    block: nn.Module
    router: nn.Module | None
    router_name: str
    experts: nn.Module
    experts_name: str
    shared: tuple[nn.Module, ...]
    geometry: Geometry
    storage: Storage
    passed: tuple[str, ...] = ()
    seam: Seam = "experts"
    chooser: nn.Module | None = field(default=None, repr=False)
    scored: int = 0
    siblings: tuple[str, ...] = ()

    @property
    def gate_home(self) -> nn.Module:
        """The module that holds the router's selection bias: the router, or the block where it passes one."""
        return self.block if self.passed else self.require_router()

    def ask(self, hidden_TH: torch.Tensor, *, stock: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the router answers to rows; see `ask_router`.

        Raises:
            UnsupportedModel: there is no router by the contract, or it does not answer.
        """
        given = tuple(getattr(self.block, name) for name in self.passed)
        answer = ask_router(self.require_router(), hidden_TH, stock=stock, passed=given)
        if answer is None:
            raise UnsupportedModel(f"the router {self.router_name!r} does not answer", layer=self.index)
        return answer

    def require_router(self) -> nn.Module:
        """The router, or an error that says why there is none.

        Raises:
            UnsupportedModel: the router does not follow the contract.
        """
        if self.router is None:
            seen = self.seam not in ("unknown", "misread")
            works = (
                "moekit profile, prune and place work on such a model, and train where it only writes; " if seen else ""
            )
            raise UnsupportedModel(
                f"no router beside {self.experts_name!r} answers hidden states alone with just (logits [T, E], weights "
                "[T, K], indices [T, K])",
                layer=self.index,
                hint=f"{works}what replaces routers or reads their logits does not" + ("" if seen else " work on it"),
            )
        return self.router
