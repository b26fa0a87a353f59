"""M-SMoE: much used experts take in those that the router treats like them (arXiv:2310.01334).

Legend: E experts, H hidden, M groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import ranking, ratio
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.merging import Groups, MergeMethod
from moekit.compress.maths.clustering.spectral import Array, cosines
from moekit.errors import NumericFault

_STATISTIC = {"logits": ("logit_gram",), "router": (), "outputs": ("all_output_gram",)}


@register(
    name="m-smoe",
    kind="merge",
    paper="arXiv:2310.01334",
    needs=("load", "logit_gram"),
    changes="weights",
    limits=(
        "The router can no longer weigh merged experts apart: pruning by saliency often writes better answers at the "
        "same size, so compare with it.",
        "The paper keeps all rows of the router and sends each to its group's expert; a stock checkpoint has one row a "
        "group (--set router=redirect keeps all, for moekit.load).",
        "Without the training that follows in the paper it is weak: published perplexities after merging a quarter of "
        "Mixtral's experts are many times those of a grouping by outputs.",
        "The official code keeps fewer experts than asked where use is tied, aligns to expert 0, and its script for "
        "Mixtral does not align; here as many as asked stay and members are aligned to the expert they join.",
    ),
)
class MSMoE(MergeMethod):
    """The most used experts stay, and each other joins the one that the router scores most like it.

    Per layer: A_i is the share of choices that fell on expert i; the M experts of the largest A are dominant; each
    other expert j joins the dominant i of the largest cosine of h_i and h_j, the experts' router logits over all
    tokens; its neurons are put in the order that is nearest to the dominant's; a group becomes sum_i A_i W_i / sum_i
    A_i. An expert that no token chose counts nothing beside others. With `--scope global` the dominant experts are the
    most used of all layers together, after the `--least` most used of each. Choose it where one cheap pass must do and
    training follows.
    """

    reads_weights: ClassVar[bool] = True

    similarity: Literal["logits", "router", "outputs"] = Field(
        default="logits",
        description="what makes experts alike: cosines of their router logits over the text, of their router rows, or "
        "of their outputs on every token, for which every expert reads every token",
    )

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[MSMoE]:
        """Each similarity, with and without alignment."""
        return [cls(), cls(similarity="router", align="none"), cls(similarity="outputs", router="mean")]

    @property
    def required(self) -> tuple[str, ...]:
        """The load, and what the similarity is taken from."""
        return ("load", *_STATISTIC[self.similarity])

    def score(self, inputs: LayerInputs) -> Tensor:
        """A, the share of all choices that fell on each expert."""
        load_E = inputs.statistics.load_E
        return ratio(load_E, load_E.sum().expand_as(load_E))

    def alike(self, inputs: LayerInputs) -> Array:
        """Cosines of the experts, [E, E].

        Raises:
            NumericFault: a statistic or a router row holds NaN or infinity; names layer and expert.
        """
        if self.similarity != "router":
            return cosines(inputs.finite(_STATISTIC[self.similarity][0]))
        rows_EH = inputs.weights.router_EH.detach().double()
        if bool((bad_E := ~rows_EH.isfinite().all(-1)).any()):
            bad, hint = int(bad_E.nonzero()[0]), "run moekit check on the model"
            raise NumericFault("the router's row is not finite", layer=inputs.layer, expert=bad, hint=hint)
        return cosines(rows_EH @ rows_EH.T)

    def groups(self, inputs: LayerInputs, scores_E: Tensor, count: int, experts: Sequence[int]) -> Groups:
        """The most used experts, each with those that resemble it most; of equal ones the more used takes in."""
        ranked = ranking(scores_E, inputs).tolist()
        order = sorted(experts, key=lambda e: (-ranked[e], e))
        dominant, alike_EE = order[:count], self.alike(inputs)
        made = [[expert] for expert in dominant]
        for expert in order[count:]:
            made[int(np.argmax(alike_EE[expert, dominant]))].append(expert)
        return made

    def figures(self, inputs: LayerInputs, groups: Groups) -> dict[str, float | list[float]]:
        """Mean similarity of pairs that were merged."""
        pairs = [pair for group in groups for pair in combinations(group, 2)]
        if not pairs:
            return {}
        alike_EE = self.alike(inputs)
        return {"similarity_within_groups": float(np.mean([alike_EE[i, j] for i, j in pairs]))}
