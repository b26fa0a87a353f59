"""REAP: router-weighted expert activation pruning (ICLR 2026, arXiv:2510.13999).

Legend: E experts.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

import moekit.trace.renormalised  # noqa: F401 - enters its statistic
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod, ratio
from moekit.compress.engine.inputs import LayerInputs


@register(
    name="reap",
    kind="prune",
    paper="arXiv:2510.13999",
    needs=("load", "renormalised_output_norm"),
    changes="weights",
    limits=(
        "A conditional mean: on badly balanced models it may fall behind weighted-ean, in which frequency counts.",
        "Follows its calibration text: calibrate on the domain, chat template applied, or generated answers suffer.",
    ),
)
class REAP(PruneMethod):
    """Keep the experts that add most to the layer's output when they are chosen.

    S_j = mean over X_j, the tokens routed to expert j, of g_j ||f_j(x)||: the gate weight times the norm of the output
    it multiplies; 0 where no token chose j. With `renormalise` the gate is first divided by the sum of the token's
    chosen gates, which the authors' code does by default since March 2026 and which only changes models that do not
    renormalise themselves. Choose it as the first of the one-pass methods on models with many small, balanced experts.
    """

    renormalise: bool = Field(
        default=True, description="divide gate weights by their token's sum; off takes them as they multiply outputs"
    )

    @property
    def required(self) -> tuple[str, ...]:
        """Load and the sum of gated output norms, with gates of either kind."""
        return ("load", "renormalised_output_norm" if self.renormalise else "gated_output_norm")

    def score(self, inputs: LayerInputs) -> Tensor:
        """Mean gated output norm of each expert, [E]."""
        load, total = (inputs.statistics[name] for name in self.required)
        return ratio(total, load)
