"""Constants that answer in the place of experts that are gone (MoNE, arXiv:2507.00390).

Legend: T tokens, H hidden, P novices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.experts.reference import by_own_code
from moekit.runtime.experts import ExpertsInputs, ExpertsPart
from moekit.runtime.router import UNANSWERED


@register(
    name="novices",
    kind="experts",
    paper="arXiv:2507.00390",
    changes="runtime",
    stock=False,
    limits=(
        "Stock transformers and vLLM open the folder without them: their tokens then go to the experts that are left.",
        "It stands beside the routing policy merge-redirect, which tells how much of each novice a token gets; `moekit "
        "prune --method mone` writes both.",
        "Novices are frozen: training does not change them.",
    ),
)
class Novices(ExpertsPart):
    """Add, for each choice of an expert that is gone, its gate times one constant vector.

    y = sum over the kept experts among a token's choices of g_i f_i(x), plus sum over the others of g_p c_p: a novice
    is H numbers in the place of an expert's 3 H I and computes nothing. Choose it through a pruning method that leaves
    novices (`mone`); a pass without that policy is refused, as nothing tells what a token gets of them.
    """

    axes: ClassVar[Mapping[str, str]] = {"novices": "PH"}
    # One call of `run`, whatever the tokens; the constants lie on every rank.
    reads_weights: ClassVar[bool] = False

    def prepare(self, tensors: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """The constants in fp32.

        Raises:
            BadConfig: they are not finite.
        """
        made = {name: tensor.float() for name, tensor in tensors.items()}
        if any(not bool(tensor.isfinite().all()) for tensor in made.values()):
            raise BadConfig("a novice holds NaN or infinity", hint="prune the model again")
        return made

    def compute(self, inputs: ExpertsInputs) -> Tensor:
        """The experts that are left, and the novices' part."""
        total_TH = inputs.run(inputs.hidden_TH, inputs.index_TK, inputs.weights_TK)
        added_TH = self._added(inputs)
        return total_TH if added_TH is None else (total_TH.float() + added_TH).to(total_TH.dtype)

    def reference(self, inputs: ExpertsInputs) -> Tensor:
        """The same with the experts that are left one after the other, each by the family's own code."""
        found = by_own_code(inputs)
        added_TH = self._added(inputs)
        return found if added_TH is None else found + added_TH

    def _added(self, inputs: ExpertsInputs) -> Tensor | None:
        """Gates times constants, [T, H] fp32; None where no layer's experts went."""
        if "novices" not in inputs.constants:
            return None
        # Rounded as the gates of the experts are.
        gates_TP = inputs.context.get(inputs.layer, UNANSWERED).to(inputs.weights_TK.dtype)
        added_TH: Tensor = gates_TP.float() @ inputs.constants["novices"]
        return added_TH
