"""Several router rows for one expert, or none: how a model with fewer experts routes as before (arXiv:2310.01334).

A merge leaves E experts of what were R. The rows of all R stay here as tensors of the policy; each names the expert
that its own went into, and a token's gates of rows with one expert add up. A row whose expert went for good names
nobody: it is chosen as before, and its gate goes to what answers in the expert's place (`moekit.experts.novices`), or
to nothing. The checkpoint itself keeps E rows, so that stock transformers opens it with plain routing.

Legend: T tokens, H hidden, R router rows, E experts, M most rows that one expert has, P rows of nobody, K choices a
token.
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
from moekit.runtime.router import UNANSWERED, ChoosePart, Routed, RouteInputs


def share_rows(
    groups: Sequence[Sequence[int]],
    rows_RH: Tensor,
    bias_R: Tensor | None = None,
    choice_bias_R: Tensor | None = None,
    *,
    nobody: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Tensors of `MergeRedirect` for one layer, by expert.

    Args:
        groups: for each expert of the smaller layer the rows that are its own: each row once.
        rows_RH: the router's matrix before experts went.
        bias_R: the router's bias, added to logits.
        choice_bias_R: the selection bias, added to scores for the choice only.
        nobody: rows whose experts went for good, in the order of whatever answers in their place.

    Returns:
        "members" [E, M] int16, -1 where an expert has fewer rows, "rows" [E, M, H], and the biases [E, M]; where there
        are rows of nobody, their "nobody" [P] int16, "nobody_rows" [P, H] and biases [P].

    Raises:
        BadConfig: a row is in no group or in several.
    """
    if sorted([*(row for group in groups for row in group), *nobody]) != list(range(len(rows_RH))):
        raise BadConfig(
            f"{len(rows_RH)} router rows must each belong to one expert",
            hint="take the groups of a method that merges all experts",
        )
    most = max(len(group) for group in groups)
    members_EM = torch.tensor([[*group, *[-1] * (most - len(group))] for group in groups])
    given = {"rows": rows_RH, "bias": bias_R, "choice_bias": choice_bias_R}
    known = {name: t.detach().cpu() for name, t in given.items() if t is not None}
    made = {"members": members_EM.to(torch.int16), **{name: t[members_EM] for name, t in known.items()}}
    if nobody:
        rows_P = torch.tensor(list(nobody))
        made |= {"nobody": rows_P.to(torch.int16), **{f"nobody_{name}": t[rows_P] for name, t in known.items()}}
    return made


def add_up(weights_TK: Tensor, expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sum each token's weights of one expert: its first choice of it has the sum, the others move, with weight 0.

    They move to experts that the token did not choose, the lowest first, and not to "no expert": stock kernels read
    that index only in models spread over ranks. Choices of nobody stay where they are and lose their weight.

    Args:
        weights_TK: gates of the chosen rows.
        expert_TK: their experts, some of them equal; E for nobody.
        experts: E, at least K.
    """
    none_TK = expert_TK == experts
    same_TKK = expert_TK[:, :, None] == expert_TK[:, None, :]
    again_TK = same_TKK.tril(-1).any(-1) & ~none_TK
    sum_TK = (same_TKK * weights_TK[:, None, :]).sum(-1).masked_fill(again_TK | none_TK, 0.0)
    used_TE = torch.zeros(len(expert_TK), experts + 1, dtype=torch.uint8, device=expert_TK.device)
    unused_TE = used_TE.scatter_(1, expert_TK, 1)[:, :experts].argsort(dim=1, stable=True)
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
        "Only a job that takes experts away has rows to give it (`moekit merge --set router=redirect`, `moekit prune "
        "--method mone`): planned from a trace alone, it routes plainly.",
        "Rows are frozen: training changes the merged rows, which this policy does not read.",
        "Traces record the logits of the rows that the checkpoint keeps, and choices of nobody as no expert.",
        "A token with two rows in one expert visits another with weight 0: it costs as much as before the merge.",
    ),
)
class MergeRedirect(ChoosePart):
    """After a merge, route by the rows of all experts that went in, and add up the gates of those in one expert.

    With rows w_r, gates p_r over all R rows and the expert c(r) that row r's own was merged into, the layer gives
    sum over a token's K best rows of p_r f_c(r)(x); a merged expert chosen through several rows runs once with the sum
    of their gates. Rows of experts that were dropped, not merged, may stay, too: their p_r are handed to what answers
    instead. Choices and weights are those of the model before, so that only the experts' weights make a difference.
    Choose it after merging where moekit itself serves or evaluates the model.
    """

    # Members are numbers of rows, which stay what they are when experts are reordered.
    axes: ClassVar[Mapping[str, str]] = {
        "members": "EM",
        "rows": "EMH",
        "bias": "EM",
        "choice_bias": "EM",
        "nobody": "P",
        "nobody_rows": "PH",
        "nobody_bias": "P",
        "nobody_choice_bias": "P",
    }

    own_rows: ClassVar[bool] = True

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
        expert_EM = torch.arange(len(members_EM), device=members_EM.device)[:, None].expand_as(members_EM)
        row, flat = members_EM[taken_EM], {"expert": expert_EM[taken_EM]}
        flat |= {name: t[taken_EM] for name, t in tensors.items() if name in ("rows", "bias", "choice_bias")}
        if "nobody" in tensors:
            alone = tensors["nobody"].to(row)
            flat["expert"] = torch.cat([flat["expert"], torch.full_like(alone, len(members_EM))])
            flat |= {name: torch.cat([t, tensors[f"nobody_{name}"]]) for name, t in flat.items() if name != "expert"}
            flat["place"] = torch.cat([torch.full_like(row, len(alone)), torch.arange(len(alone)).to(row)])
            row = torch.cat([row, alone])
        if len(row) % self.groups:
            raise BadConfig(f"{len(row)} router rows do not divide into {self.groups} groups")
        order = row.argsort()
        # The numbers of nobody's rows stay for their count, which is known without looking into a tensor.
        return {name: t[order] for name, t in flat.items()} | {n: t for n, t in tensors.items() if n == "nobody"}

    def choose(self, inputs: RouteInputs) -> Routed:
        """Choose among rows by the family's own gate, then add up."""
        tensors = inputs.constants
        if not tensors:
            return Routed(*inputs.gate(inputs.logits))
        weights_TK, indices_TK = self._rows(inputs)
        if "nobody" in tensors:
            nobody, place_TK = len(tensors["nobody"]), tensors["place"][indices_TK]
            gates_TP = weights_TK.new_zeros(len(weights_TK), nobody + 1).scatter_add(1, place_TK, weights_TK)
            inputs.context.put(inputs.layer, UNANSWERED, gates_TP[:, :nobody])
        return Routed(*add_up(weights_TK, tensors["expert"][indices_TK], inputs.geometry.experts))

    def _rows(self, inputs: RouteInputs) -> tuple[Tensor, Tensor]:
        """Gates and numbers of the chosen rows, [T, K] each."""
        gate, dtype, tensors = inputs.gate, inputs.logits.dtype, inputs.constants
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
        return rows.weigh(logits_TR, indices_TK), indices_TK
