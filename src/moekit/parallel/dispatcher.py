"""The one interface of dispatchers: plan, dispatch, local experts, combine.

A dispatcher stands in for a layer's experts: it gets the tokens that this rank holds and their choices as logical ids,
and returns each token's weighted sum of expert outputs, as the whole layer would have. Routers, policies and training
never know of it. Between `dispatch` and `combine` rows travel, and other work may be done.

Legend: N tokens, K choices, H hidden size, P rows sent, Q rows received, S slots a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moekit.parallel.layout import ExpertLayout
from moekit.parallel.ranks import Ranks
from moekit.parallel.traffic import Traffic
from moekit.parallel.wire import Codec

# Runs this rank's experts: (rows [Q, H], local ids [Q, S], weights [Q, S]) -> weighted sums [Q, H]. The number of local
# experts as id stands for none.
RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DispatchOptions:
    """Knobs that all dispatchers know.

    Attributes:
        codec: "int8" sends hidden states in 8 bits on the way out; lossy.
    """

    codec: Codec = "none"


@dataclass(eq=False)
class Dispatcher(ABC):
    """Base of the dispatchers.

    Attributes:
        layout: which rank owns which expert.
        options: knobs.
        needs_shared_batch: whether all ranks must hold the same tokens.
    """

    needs_shared_batch: ClassVar[bool] = False

    layout: ExpertLayout
    options: DispatchOptions = field(default_factory=DispatchOptions)

    @classmethod
    @abstractmethod
    def over(cls, layout: ExpertLayout, ranks: Ranks, options: DispatchOptions) -> Dispatcher:
        """A dispatcher for one layer.

        Args:
            layout: who owns its experts.
            ranks: process groups.
            options: knobs.

        Raises:
            BadConfig: it does not work on such ranks.
        """

    @abstractmethod
    def dispatch(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Any:
        """Let this rank's tokens leave, without waiting for others'.

        Args:
            x_NH: hidden states of this rank's tokens; there may be none.
            indices_NK: logical ids of their experts, E for none.
            weights_NK: their router weights.

        Returns:
            What `combine` needs.

        Raises:
            PeerLost: a rank is gone or does not answer in time.
        """

    @abstractmethod
    def combine(self, flight: Any, run: RunExperts) -> Tensor:
        """Receive rows, run this rank's experts on them, and bring every token's weighted sum home: [N, H].

        Args:
            flight: from `dispatch`.
            run: this rank's experts.

        Raises:
            PeerLost: a rank is gone or does not answer in time.
        """

    def __call__(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor, run: RunExperts) -> Tensor:
        """Dispatch and combine."""
        return self.combine(self.dispatch(x_NH, indices_NK, weights_NK), run)

    @property
    @abstractmethod
    def traffic(self) -> dict[str, Traffic]:
        """Counters by link: "ranks", or "nodes" and "ranks" where there are two stages."""


def run_local(run: RunExperts, rows_QH: Tensor, local_QS: Tensor, weights_QS: Tensor, experts: int) -> Tensor:
    """Run this rank's experts, also where nothing arrived.

    Without rows an empty batch goes through one expert all the same, so that its weights get a gradient of zero and
    every rank's backward issues the same collectives.

    Args:
        run: the experts.
        rows_QH: hidden states.
        local_QS: local ids, `experts` or more for none.
        weights_QS: router weights, anything where there is no expert.
        experts: how many this rank owns; with 0 nothing is run.
    """
    none_QS = local_QS >= experts
    local_QS = local_QS.masked_fill(none_QS, experts)
    weights_QS = weights_QS.masked_fill(none_QS, 0)
    if experts == 0:  # zeros that autograd knows where they come from
        return rows_QH * weights_QS.sum(-1, keepdim=True)
    if len(rows_QH) and local_QS.shape[1] > 1:
        return _run_pairs(run, rows_QH, local_QS, weights_QS, none_QS)
    if len(rows_QH):
        return run(rows_QH, local_QS, weights_QS)
    one_1S = torch.zeros(1, local_QS.shape[1], dtype=torch.int64, device=rows_QH.device)
    return run(rows_QH.sum(0, keepdim=True), one_1S, weights_QS.sum(0, keepdim=True))[:0]


def _run_pairs(run: RunExperts, rows_QH: Tensor, local_QS: Tensor, weights_QS: Tensor, none_QS: Tensor) -> Tensor:
    """Run experts on (row, expert) pairs: kernels gather a copy for every slot they are given, also for empty ones."""
    row, slot = (~none_QS).nonzero(as_tuple=True)
    one_P1, gate_P1 = local_QS[row, slot].unsqueeze(1), weights_QS[row, slot].unsqueeze(1)
    if len(row) == 0:
        return run(rows_QH[:1], local_QS[:1, :1] * 0, weights_QS[:1, :1])[:0].sum() + rows_QH * 0
    out_PH = run(rows_QH.index_select(0, row), one_P1, gate_P1)
    return torch.zeros_like(rows_QH, dtype=out_PH.dtype).index_add(0, row, out_PH)
