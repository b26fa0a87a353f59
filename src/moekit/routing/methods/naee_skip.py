"""NAEE's dynamic skipping: leave a token's second expert out where its weight is small (arXiv:2402.14800).

Legend: T and N tokens, E experts, K choices a token (2 here), B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.routing.second import median_ratio, refuse_other_than_two, skip_second
from moekit.runtime.part import PlanInputs
from moekit.runtime.router import LimitPart, Routed, RouteInputs
from moekit.trace.batch import TokenBatch
from moekit.trace.vocabulary import BINS, statistic


@statistic(shape="B", sources=("weights",), integer=True)
def gate_ratio(seen: TokenBatch) -> Tensor:
    """Tokens by the ratio of their second largest to their largest gate weight, in equal bins over [0, 1].

    Tokens with fewer than two experts of positive weight are left out.
    """
    if seen.indices_NK.shape[1] < 2:
        return torch.zeros(BINS, dtype=torch.int64, device=seen.indices_NK.device)
    first_N, second_N = seen.weights_NK.topk(2, dim=1).values.unbind(dim=1)
    ratio_n = (second_N / first_N)[second_N > 0]
    return torch.bincount((ratio_n * BINS).long().clamp_max(BINS - 1), minlength=BINS)


@register(
    name="naee-skip",
    kind="routing",
    paper="arXiv:2402.14800",
    needs=("gate_ratio",),
    changes="routing",
    stock=False,
    traits=("variable_k",),
    limits=(
        "For models that choose two experts a token.",
        "Saves time only where the experts' kernels skip choices of no expert.",
    ),
)
class NAEESkip(LimitPart):
    """A token's second expert is skipped where its weight is below beta times the first expert's.

    With w1 >= w2 the weights of a token's two experts, the second is skipped if w2 < beta w1, and the first gets the
    weight the family would give it as the only choice: 1 where the family renormalises. beta is each layer's median of
    w2 / w1 on the calibration text, so that about half the tokens need one expert only. Choose it to spend less time on
    a top-2 model without changing its weights, after pruning or instead of it.
    """

    axes: ClassVar[Mapping[str, str]] = {"beta": ""}

    beta: float | None = Field(
        default=None, ge=0, le=1, description="threshold for all layers; None takes each layer's median from the trace"
    )

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[NAEESkip]:
        """Some tokens skip, and all do."""
        return [cls(beta=0.5), cls(beta=1.0)]

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse models that do not choose two experts a token."""
        refuse_other_than_two(geometry.top_k, layer, "use the topk policy with a smaller top_k")

    def plan(self, inputs: PlanInputs) -> dict[str, Tensor]:
        """The layer's beta, a scalar in fp32; nothing where the knob gives it.

        Raises:
            BadData: the trace lacks the ratios, or no token chose two experts.
        """
        return {} if self.beta is not None else {"beta": median_ratio(inputs, "beta")}

    def limit(self, inputs: RouteInputs, routed: Routed) -> Routed:
        """Skip the second of two choices; a skipped choice is expert E with weight 0."""
        return skip_second(inputs, routed, inputs.constants["beta"] if self.beta is None else self.beta)
