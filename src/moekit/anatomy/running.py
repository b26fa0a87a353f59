"""Whether a block's experts run as its router chooses: asked on small rows, on a copy with random weights.

Legend: T tokens, E experts, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.anatomy.asking import PROBE_ROWS, probe_rows, raw_answer, stirred
from moekit.anatomy.choices import gates_in
from moekit.anatomy.storage import Storage, activation_of, expert_of

# Outputs may be scaled as a whole: NLLB's are, by the share of tokens that it drops in training.
_PARALLEL = 1 - 1e-4


def runs_what_is_chosen(router: nn.Module, experts: nn.Module, storage: Storage) -> bool:
    """Whether experts that are called with what their router answers give each token's weighted sum of its experts.

    Args:
        router: answers a mask of the first choice, weights of all experts and logits, [T, E] each.
        experts: are called with hidden states, that mask and these weights.
        storage: how the experts lie.

    Returns:
        Whether the direction of every token's output is that of sum_e weight[t, e] * expert_e(x_t); False, too, where
        the activation of an expert is not known, or the call fails.
    """
    if activation_of(experts, storage) is None:
        return False
    asked, twin = stirred(router), stirred(experts)
    rows_TH = probe_rows(asked, storage.hidden)
    answer = raw_answer(asked, asked.forward, rows_TH)
    gates_TE = gates_in(answer, storage.experts) if isinstance(answer, tuple) else None
    if gates_TE is None:
        return False
    mask_TE = next(a for a in answer if isinstance(a, Tensor) and not a.is_floating_point())  # type: ignore[attr-defined]
    made = raw_answer(twin, lambda rows: twin.forward(rows, mask_TE, gates_TE), rows_TH)
    if not isinstance(made, Tensor) or made.shape != rows_TH.shape:
        return False
    with torch.no_grad():
        each_TEH = torch.stack([expert_of(twin, storage, e)(rows_TH)[1] for e in range(storage.experts)], dim=1)
    expected_TH = torch.einsum("te,teh->th", gates_TE, each_TEH)
    alike_T = nn.functional.cosine_similarity(made.float(), expected_TH.float(), dim=1)
    return len(alike_T) == PROBE_ROWS and bool((alike_T > _PARALLEL).all())
