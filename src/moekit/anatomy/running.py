"""Whether a block's experts run as its router chooses: asked on a few random rows, without their weights.

Legend: T tokens, E experts, H hidden.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from moekit.anatomy.asking import on_cpu, probe_rows, raw_answer
from moekit.anatomy.choices import gates_in
from moekit.anatomy.storage import Storage

# Outputs may be scaled as a whole: NLLB's are, by the share of tokens that it drops in training.
_PARALLEL = 1 - 1e-4


class _Scaling(nn.Module):
    """Stands in for an expert: it multiplies each channel by a number of its own."""

    def __init__(self, scale_H: Tensor) -> None:
        super().__init__()
        self._scale_H = scale_H

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self._scale_H.to(hidden)


def runs_what_is_chosen(router: nn.Module, experts: nn.Module, storage: Storage) -> bool | None:
    """Whether experts that are called with what their router answers give each token's weighted sum of its experts.

    The experts' own forward is asked, with stand-ins in the places of its experts, so that no weight is read.

    Args:
        router: answers a mask of the first choice, weights of all experts and logits, [T, E] each.
        experts: are called with hidden states, that mask and these weights.
        storage: how the experts lie.

    Returns:
        Whether the direction of every token's output is that of sum_e weight[t, e] * expert_e(x_t); None where experts
        are no modules of their own, or do not answer.
    """
    if storage.kind != "listed":
        return None
    asked = on_cpu(router)
    rows_TH = probe_rows(asked, storage.hidden).cpu()
    answer = raw_answer(asked, asked.forward, rows_TH.to(next(asked.parameters()).device))
    if not isinstance(answer, tuple) or (gates_TE := gates_in(answer, storage.experts)) is None:
        return None
    mask_TE = next(a for a in answer if isinstance(a, Tensor) and not a.is_floating_point())
    scales_EH = torch.randn(storage.experts, storage.hidden, generator=torch.Generator().manual_seed(1))
    gates_TE = gates_TE.cpu().float()
    twin = _with_stand_ins(experts, storage, scales_EH)
    made = raw_answer(twin, lambda rows: twin.forward(rows, mask_TE.cpu(), gates_TE), rows_TH.float())
    if not isinstance(made, Tensor) or made.shape != rows_TH.shape:
        return None
    expected_TH = rows_TH.float() * (gates_TE @ scales_EH)
    return bool((nn.functional.cosine_similarity(made, expected_TH, dim=1) > _PARALLEL).all())


def _with_stand_ins(experts: nn.Module, storage: Storage, scales_EH: Tensor) -> nn.Module:
    """The module, sharing all but its experts."""
    names = list(dict.fromkeys(name.partition(".")[0] for name in storage.names))
    twin = copy.copy(experts)
    stand_ins = {name: _Scaling(scale_H) for name, scale_H in zip(names, scales_EH, strict=True)}
    twin.__dict__["_modules"] = {**experts._modules, **stand_ins}
    return twin
