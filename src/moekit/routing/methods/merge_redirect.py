"""Several router rows for one expert: how a merged model routes as if nothing had been merged (arXiv:2310.01334).

A merge leaves E experts of what were R. The rows of all R stay here as tensors of the policy; each names the expert
that its own went into, and a token's gates of rows with one expert add up. The checkpoint itself keeps E rows, so that
stock transformers opens it with plain routing.

Legend: T tokens, H hidden, R router rows, E experts, M most rows that one expert has, K choices a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from moekit.anatomy.gate import Gate, group_mask
from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.runtime.router import ChoosePart, Routed, RouteInputs


def share_rows(
    groups: Sequence[Sequence[int]], rows_RH: Tensor, bias_R: Tensor | None = None, choice_bias_R: Tensor | None = None
) -> dict[str, Tensor]:
    """Tensors of `MergeRedirect` for one layer, by expert.

    Args:
        groups: for each expert of the merged layer the rows that are its own: each row once.
        rows_RH: the router's matrix before the merge.
        bias_R: the router's bias, added to logits.
        choice_bias_R: the selection bias, added to scores for the choice only.

    Returns:
        "members" [E, M] int16, -1 where an expert has fewer rows, "rows" [E, M, H], and the biases [E, M].

    Raises:
        BadConfig: a row is in no group or in several.
    """
    if sorted(row for group in groups for row in group) != list(range(len(rows_RH))):
        raise BadConfig(
            f"{len(rows_RH)} router rows must each belong to one expert",
            hint="take the groups of a method that merges all experts",
        )
    most = max(len(group) for group in groups)
    members_EM = torch.tensor([[*group, *[-1] * (most - len(group))] for group in groups])
    given = {"rows": rows_RH, "bias": bias_R, "choice_bias": choice_bias_R}
    spread = {name: t.detach().cpu()[members_EM] for name, t in given.items() if t is not None}
    return {"members": members_EM.to(torch.int16), **spread}


def add_up(weights_TK: Tensor, expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sum each token's weights of one expert: its first choice of it has the sum, the others move, with weight 0.

    They move to experts that the token did not choose, the lowest first, and not to "no expert": stock kernels read
    that index only in models spread over ranks.

    Args:
        weights_TK: gates of the chosen rows.
        expert_TK: their experts, some of them equal.
        experts: E, at least K.
    """
    same_TKK = expert_TK[:, :, None] == expert_TK[:, None, :]
    again_TK = same_TKK.tril(-1).any(-1)
    sum_TK = (same_TKK * weights_TK[:, None, :]).sum(-1).masked_fill(again_TK, 0.0)
    used_TE = torch.zeros(len(expert_TK), experts, dtype=torch.uint8, device=expert_TK.device)
    unused_TE = used_TE.scatter_(1, expert_TK, 1).argsort(dim=1, stable=True)
    spare_TK = unused_TE.gather(1, (again_TK.cumsum(1) - 1).clamp_min(0))
    return sum_TK, torch.where(again_TK, spare_TK, expert_TK)


@register(
    name="merge-redirect",
    kind="routing",
    paper="arXiv:2310.01334",
    changes="routing",
    stock=False,
    limits=(
        "Stock transformers and vLLM open the folder with plain routing by the merged rows.",
        "Only a merge has groups to give it: planned from a trace alone, it routes plainly.",
        "Rows are frozen: training changes the merged rows, which this policy does not read.",
        "Traces record the logits of the merged rows.",
        "A token with two rows in one expert visits another with weight 0: it costs as much as before the merge.",
    ),
)
class MergeRedirect(ChoosePart):
    """After a merge, route by the rows of all experts that went in, and add up the gates of those in one expert.

    With rows w_r, gates p_r over all R rows and the expert c(r) that row r's own was merged into, the layer gives
    sum over a token's K best rows of p_r f_c(r)(x); a merged expert chosen through several rows runs once with the sum
    of their gates. Choices and weights are those of the model before the merge, so that only the experts' weights make
    a difference. Choose it after merging (such as `uncurl`) where moekit itself serves or evaluates the model.
    """

    # Members are numbers of rows, which stay what they are when experts are reordered.
    axes: ClassVar[Mapping[str, str]] = {"members": "EM", "rows": "EMH", "bias": "EM", "choice_bias": "EM"}

    top_k: int | None = Field(default=None, ge=1, description="rows a token chooses; None: the model's own K")
    groups: int = Field(default=1, ge=1, description="groups of rows that limited the choice before the merge")
    top_groups: int = Field(default=1, ge=1, description="of these groups so many were open to a token")
    group_score: Literal["max", "top2"] = Field(default="top2", description="what a group of rows was judged by")

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse more choices than there are experts left: a token's choices must find an expert each."""
        if self.top_k is not None and self.top_k > geometry.experts:
            raise BadConfig(
                f"top_k is {self.top_k}, but there are {geometry.experts} experts",
                layer=layer,
                hint=f"choose 1 to {geometry.experts}, or merge into more experts",
            )

    def prepare(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """Rows and biases as the router had them before the merge, and the expert of each row.

        Raises:
            BadConfig: rows do not divide into the groups.
        """
        if not tensors:
            return {}
        members_EM = tensors["members"].to(torch.int64)
        taken_EM = members_EM >= 0
        order = members_EM[taken_EM].argsort()
        if len(order) % self.groups:
            raise BadConfig(f"{len(order)} router rows do not divide into {self.groups} groups")
        expert_EM = torch.arange(len(members_EM), device=members_EM.device)[:, None].expand_as(members_EM)
        flat = {name: t[taken_EM][order] for name, t in tensors.items() if name != "members"}
        return {"expert": expert_EM[taken_EM][order], **flat}

    def choose(self, inputs: RouteInputs) -> Routed:
        """Choose among rows by the family's own gate, then add up."""
        gate, logits_TE, tensors = inputs.gate, inputs.logits, inputs.constants
        if not tensors:
            return Routed(*gate(logits_TE))
        dtype = logits_TE.dtype
        bias_R = tensors.get("bias")
        logits_TR = linear(
            inputs.hidden_TH.to(dtype), tensors["rows"].to(dtype), None if bias_R is None else bias_R.to(dtype)
        )
        spec = replace(gate.spec, bias="", groups=self.groups, top_groups=self.top_groups, group_score=self.group_score)
        rows = Gate(spec if self.top_k is None else replace(spec, top_k=self.top_k), gate.router)
        selection_TR = rows.scores(logits_TR)
        if (choice_bias_R := tensors.get("choice_bias")) is not None:
            selection_TR = selection_TR + choice_bias_R
        if self.groups > 1:
            selection_TR = selection_TR.masked_fill(~group_mask(selection_TR, spec), float("-inf"))
        indices_TK = rows.choose(selection_TR)
        weights_TK = rows.weigh(logits_TR, indices_TK)
        return Routed(*add_up(weights_TK, tensors["expert"][indices_TK], inputs.geometry.experts))
