"""Vectors that answer in the place of a token's weaker experts, by modulating the stronger ones (arXiv:2503.00634).

Legend: T tokens, n tokens of one expert, K choices a token, M main ones, A auxiliary ones, E experts, H hidden, I
width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.experts.reference import by_own_code
from moekit.experts.split import find_split, one_expert
from moekit.runtime.experts import ExpertsInputs, ExpertsPart
from moekit.runtime.part import LayerInit

_SMALL = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Split:
    """A token's choices, the strongest first.

    Attributes:
        main_TM: experts that compute.
        weights_TM: their weights.
        share_TE: how much of each expert's vectors a token gets, fp32; rows add up to 1, or to 0 without any choice.
    """

    main_TM: Tensor
    weights_TM: Tensor
    share_TE: Tensor


def split(index_TK: Tensor, weights_TK: Tensor, main: int, experts: int, renormalize: bool) -> Split:
    """The choices of largest weight, and the shares of the others.

    Args:
        index_TK: choices; E is "no expert".
        weights_TK: their weights.
        main: M, less than K.
        experts: E.
        renormalize: give the main ones the weight of all.
    """
    order_TK = weights_TK.argsort(dim=1, descending=True, stable=True)
    index_TK, weights_TK = index_TK.gather(1, order_TK), weights_TK.gather(1, order_TK)
    weights_TM, rest_TA = weights_TK[:, :main], weights_TK[:, main:].float()
    # In fp32 and with a floor: all of them may be 0, and so may their sum in half precision.
    share_TA = rest_TA / rest_TA.sum(dim=1, keepdim=True).clamp_min(_SMALL)
    share_TE = share_TA.new_zeros(len(index_TK), experts + 1).scatter_add(1, index_TK[:, main:], share_TA)[:, :experts]
    if renormalize:
        whole_T1 = weights_TK.float().sum(dim=1, keepdim=True)
        kept_T1 = weights_TM.float().sum(dim=1, keepdim=True).clamp_min(_SMALL)
        weights_TM = (weights_TM.float() * (whole_T1 / kept_T1)).to(weights_TM.dtype)
    return Split(index_TK[:, :main], weights_TM, share_TE)


@register(
    name="compressed-experts",
    kind="experts",
    paper="arXiv:2503.00634",
    changes="runtime",
    stock=False,
    limits=(
        "Until it is trained it is the model with fewer experts a token, and loses what that loses.",
        "All experts stay in memory: it saves computing, not bytes.",
        "The vectors differ by token, so they cannot be folded into weights; stock transformers and vLLM open the "
        "folder without them.",
        "mode three runs experts one by one, slower than grouped kernels; it needs gated experts in one process.",
    ),
)
class CompressedExperts(ExpertsPart):
    """Run a token's strongest experts only; learned vectors of the weaker ones modulate what those compute.

    Of a token's K choices the `main` largest by weight run. Each other choice i lends three vectors c1 [H], c2 [I] and
    c3 [H], averaged by the weights p_i among those others, and every main expert e gives
    p_e down(act(gate (x * c1)) * up (x * c3) * c2). All vectors start at one: the layer then is the one with `main`
    choices. Choose it to fine-tune a MoE for half the computing a token where halving the choices alone loses too much:
    attach it (`moekit.runtime.attach`), save, and train the folder.
    """

    # What is learned is the distance from one, so that weight decay pulls to the plain expert and not to none.
    axes: ClassVar[Mapping[str, str]] = {"gate": "EH", "inner": "EI", "up": "EH", "input": "EH"}

    main: int | None = Field(default=None, ge=1, description="experts that run for a token; None is half the choices")
    mode: Literal["three", "input"] = Field(
        default="three", description="three vectors an expert, or one on the input (c1 = c3, c2 = 1), for any kernel"
    )
    renormalize: Literal["auto", "main", "topk"] = Field(
        default="auto",
        description="main experts get the weight of all choices (main), or keep the weight they had among all (topk); "
        "auto: main where the model's router normalises weights, topk where it does not (OLMoE, Qwen2-MoE)",
    )

    @property
    def asks_gate(self) -> bool:
        """Whether the router normalises is to be found out."""
        return self.renormalize == "auto"

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse layers that choose too few experts, and experts without a gate projection for three vectors."""
        most = geometry.top_k
        if (self.main or 1) > most or (self.main is None and most < 2):
            raise BadConfig(
                f"a token chooses {most} expert(s) here, so {self.main or 'half of them'} cannot be the main ones",
                layer=layer,
                hint=f"main may be 1 to {most}" if most else "this router does not say how many experts it chooses",
            )
        if self.mode == "three" and not geometry.has_gate:
            raise BadConfig("these experts have no gate projection", layer=layer, hint='use mode "input"')

    def check_dealt_out(self, layer: int) -> None:
        """One vector on the input needs no weights; three do."""
        if self.mode == "three":
            super().check_dealt_out(layer)

    def parameters(self, init: LayerInit) -> nn.Module:
        """Zeros: vectors of one.

        Raises:
            UnsupportedModel: three vectors, but the experts' weights cannot be read.
        """
        sizes = {"input": init.geometry.hidden}
        if self.mode == "three":
            find_split(init.module, init.layer)
            sizes = {"gate": init.geometry.hidden, "inner": init.geometry.width, "up": init.geometry.hidden}
        made = {name: nn.Parameter(torch.zeros(init.geometry.experts, size)) for name, size in sizes.items()}
        return nn.ParameterDict(made)

    def compute(self, inputs: ExpertsInputs) -> Tensor:
        """The main experts on modulated inputs; all choices as they are where none is auxiliary."""
        found = self._split(inputs)
        if found is None:
            return inputs.run(inputs.hidden_TH, inputs.index_TK, inputs.weights_TK)
        if self.mode == "input":
            return inputs.run(self._times(inputs, found, "input"), found.main_TM, found.weights_TM)
        return self._three(inputs, found)

    def reference(self, inputs: ExpertsInputs) -> Tensor:
        """The same with one expert after the other, and vectors averaged choice by choice."""
        found = self._split(inputs)
        hidden_TH = inputs.hidden_TH.float()
        if self.mode == "input" or found is None:
            main = (inputs.index_TK, inputs.weights_TK) if found is None else (found.main_TM, found.weights_TM)
            given_TH = hidden_TH if found is None else self._times(inputs, found, "input").float()
            return by_own_code(replace(inputs, hidden_TH=given_TH, index_TK=main[0], weights_TK=main[1]))
        return torch.stack([self._reference_row(inputs, found, token) for token in range(len(hidden_TH))])

    def _reference_row(self, inputs: ExpertsInputs, found: Split, token: int) -> Tensor:
        storage, tensors = find_split(inputs.module, inputs.layer), dict(inputs.module.named_parameters())
        x_H = inputs.hidden_TH[token].float()
        c1_H, c2_I, c3_H = torch.ones_like(x_H), torch.ones(inputs.geometry.width).to(x_H), torch.ones_like(x_H)
        for expert, share in enumerate(found.share_TE[token]):
            c1_H = c1_H + share * inputs.learned["gate"][expert].float()
            c2_I = c2_I + share * inputs.learned["inner"][expert].float()
            c3_H = c3_H + share * inputs.learned["up"][expert].float()
        total_H = torch.zeros_like(x_H)
        for expert, weight in zip(found.main_TM[token].tolist(), found.weights_TM[token].float(), strict=True):
            if expert == inputs.geometry.experts:
                continue
            given_H = x_H * weight if inputs.geometry.weighs_inputs else x_H
            run = one_expert(inputs.module, storage, tensors, expert)
            output_H = run((given_H * c1_H)[None], (given_H * c3_H)[None], c2_I[None])[0]
            total_H = total_H + (output_H if inputs.geometry.weighs_inputs else weight * output_H)
        return total_H

    def _split(self, inputs: ExpertsInputs) -> Split | None:
        """None where all choices are main ones."""
        main = self.main or (inputs.geometry.top_k + 1) // 2
        if main >= inputs.index_TK.shape[1]:
            return None
        renormalize = inputs.shares_out if self.renormalize == "auto" else self.renormalize == "main"
        return split(inputs.index_TK, inputs.weights_TK, main, inputs.geometry.experts, renormalize)

    def _times(self, inputs: ExpertsInputs, found: Split, name: str) -> Tensor:
        """The hidden states times the tokens' vectors of a name."""
        return (inputs.hidden_TH.float() * self._vector(inputs, found, name)).to(inputs.hidden_TH.dtype)

    def _vector(self, inputs: ExpertsInputs, found: Split, name: str) -> Tensor:
        vector: Tensor = 1 + found.share_TE @ inputs.learned[name].float()
        return vector

    def _three(self, inputs: ExpertsInputs, found: Split) -> Tensor:
        storage, tensors = find_split(inputs.module, inputs.layer), dict(inputs.module.named_parameters())
        gate_TH, up_TH = self._times(inputs, found, "gate"), self._times(inputs, found, "up")
        factor_TI = self._vector(inputs, found, "inner").to(gate_TH.dtype)
        total_TH = torch.zeros_like(inputs.hidden_TH)
        for expert in torch.unique(found.main_TM).tolist():
            if expert == inputs.geometry.experts:
                continue
            rows_n, place_n = (found.main_TM == expert).nonzero(as_tuple=True)
            weight_n1 = found.weights_TM[rows_n, place_n, None].to(gate_TH.dtype)
            given = gate_TH[rows_n], up_TH[rows_n]
            if inputs.geometry.weighs_inputs:
                given = given[0] * weight_n1, given[1] * weight_n1
            output_nH = one_expert(inputs.module, storage, tensors, expert)(*given, factor_TI[rows_n])
            if not inputs.geometry.weighs_inputs:
                output_nH = output_nH * weight_n1
            total_TH = total_TH.index_add(0, rows_n, output_nH.to(total_TH.dtype))
        return total_TH
