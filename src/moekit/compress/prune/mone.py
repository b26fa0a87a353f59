"""MoNE: experts that go leave a constant behind that answers their tokens (ICLR 2026, arXiv:2507.00390).

Legend: T tokens, n tokens of one expert, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from moekit import catalogue
from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod, ratio
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import BadConfig
from moekit.trace.batch import ExpertBatch, widest
from moekit.trace.vocabulary import expert_statistic

# Sums of which constants and their errors are made: load, g, E, E^2 by channel, g^2, g^2 E, g^2 ||E||^2.
_OF_SCORES = ("load", "gate_mass", "output_sum", "output_channel_square")
_OF_ERRORS = ("gate_square", "square_gated_output_sum", "gated_output_square")


@expert_statistic(shape="EH", sources=("outputs",))
def output_channel_square(seen: ExpertBatch) -> Tensor:
    """Sum of the expert's squared outputs before gating, by channel: their variance follows (arXiv:2507.00390)."""
    return seen.outputs_nH.to(widest(seen.outputs_nH.device)).square().sum(0)


@expert_statistic(shape="EH", sources=("weights", "outputs"))
def square_gated_output_sum(seen: ExpertBatch) -> Tensor:
    """Sum of g^2 f(x) over the expert's tokens, by channel: what a constant in its place should be nearest to."""
    wide = widest(seen.outputs_nH.device)
    return seen.weights_n.to(wide).square() @ seen.outputs_nH.to(wide)


def mean_rows(sum_EH: Tensor, count_E: Tensor) -> Tensor:
    """Sums divided by counts, [E, H] fp64; 0 where nothing was counted."""
    return ratio(sum_EH, count_E[:, None].expand_as(sum_EH))


def spread_of_outputs(load_E: Tensor, sum_EH: Tensor, square_EH: Tensor) -> Tensor:
    """Norm over channels of the sample standard deviation of outputs, [E] fp64; 0 for fewer than two tokens.

    Args:
        load_E: tokens of each expert.
        sum_EH: sum of its outputs.
        square_EH: sum of their squares.
    """
    count_E1 = load_E.double()[:, None]
    around_EH = (square_EH.double() - mean_rows(sum_EH, load_E) * sum_EH.double()).clamp_min(0)
    return (around_EH / (count_E1 - 1).clamp_min(1)).sum(1).sqrt()


def errors_left(constant_EH: Tensor, square_E: Tensor, sum_EH: Tensor, norm_E: Tensor) -> Tensor:
    """Sum over an expert's tokens of g^2 ||E - c||^2 for a constant c in its place, [E] fp64.

    Args:
        constant_EH: c.
        square_E: sum of g^2.
        sum_EH: sum of g^2 E.
        norm_E: sum of g^2 ||E||^2.
    """
    c_EH = constant_EH.double()
    left_E = norm_E.double() - 2 * (c_EH * sum_EH.double()).sum(1) + square_E.double() * c_EH.square().sum(1)
    return left_E.clamp_min(0)


def _scorer(name: str) -> PruneMethod:
    """Another pruning method, for its scores.

    Raises:
        BadConfig: there is none of this name, or it does not rank by statistics of one pass alone.
    """
    found: PruneMethod = catalogue.make("prune", name, {})
    ranks = type(found).decide is PruneMethod.decide
    if not ranks or found.rewrites or found.reads_weights or found.passes not in ("once", "none"):
        raise BadConfig(
            f"{name} does not rank experts by statistics of one pass alone",
            hint="take one that does, such as reap, easy-ep, weighted-ean or frequency",
        )
    return found


@register(
    name="mone",
    kind="prune",
    paper="arXiv:2507.00390",
    needs=_OF_SCORES,
    changes="weights",
    stock=False,
    limits=(
        "With novices the folder needs moekit.load: stock transformers and vLLM open it without them and send their "
        "tokens to the experts that are left (`--set operator=drop` is made for them).",
        "Novices are means over the calibration text: calibrate on the domain that is served.",
        "No saving of computation is claimed: choices of novices are skipped by the experts, but engines' own kernels "
        "do not know of them.",
        "Routers that score by more than one matrix cannot go on by their old rows; such families are refused.",
    ),
)
class MoNE(PruneMethod):
    """Keep the experts whose outputs vary most, and let the others' mean outputs answer in their place.

    phi_j = phi_var phi_freq: the norm over channels of the standard deviation of f_j(x) over the expert's tokens, times
    its mean gate weight. Where expert j goes, the router stays as it is and g_j c_j takes the place of g_j f_j(x), c_j
    a constant *novice*: the mean of f_j(x) (`operator` mean), the constant that changes the layer's output least (g2:
    sum g^2 f / sum g^2), or zero; drop takes its router row, too, so that its tokens choose other experts. Statistics
    are pooled sums. Experts that no token chose become zero novices. Choose it where a quarter to a half of the experts
    must go, no training follows, and moekit itself serves the result.
    """

    operator: Literal["mean", "g2", "zero", "drop"] = Field(
        default="mean",
        description="what answers the tokens of an expert that goes: its mean output, the constant nearest to what it "
        "added (weighted by squared gates), nothing, or (drop) other experts, as the router's row goes, too",
    )
    frequency: Literal["over-all-tokens", "given-selection"] = Field(
        default="over-all-tokens",
        description="the mean gate weight that counts: over all tokens, 0 where the expert is not chosen (the authors' "
        "code), or over those that chose it",
    )
    scorer: str = Field(
        default="mone",
        description="whose scores say who stays: mone's own, or those of another pruning method that ranks by "
        "statistics of one pass, with its default knobs (reap, easy-ep, frequency, ...)",
    )

    @field_validator("scorer")
    @classmethod
    def _ranks(cls, name: str) -> str:
        """Only a method that ranks, and needs nothing but statistics for it, can lend its scores."""
        if name != "mone":
            _scorer(name)
        return name

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[MoNE]:
        """Each operator, both frequencies, and scores of another method."""
        return [
            cls(),
            cls(operator="g2", frequency="given-selection"),
            cls(operator="zero", scorer="frequency"),
            cls(operator="drop"),
        ]

    @property
    def required(self) -> tuple[str, ...]:
        """What the score needs, and what errors of constants need where constants are left."""
        own = _OF_SCORES if self.operator == "drop" else (*_OF_SCORES, *_OF_ERRORS)
        return own if self.scorer == "mone" else tuple(dict.fromkeys((*own, *_scorer(self.scorer).required)))

    @property
    def redirects(self) -> bool:
        """Whether the router stays as it is."""
        return self.operator != "drop"

    def score(self, inputs: LayerInputs) -> Tensor:
        """Spread of outputs times frequency, [E], 0 for fewer than two tokens; or another method's scores."""
        if self.scorer != "mone":
            return _scorer(self.scorer).score(inputs)
        seen = inputs.statistics
        spread_E = spread_of_outputs(seen.load_E, inputs.finite("output_sum"), inputs.finite("output_channel_square"))
        if self.frequency == "given-selection":
            return spread_E * ratio(seen["gate_mass"], seen.load_E)
        return spread_E * seen["gate_mass"].double() / max(seen.tokens, 1)

    def decide(self, inputs: LayerInputs, scores_E: Tensor, share: int) -> LayerOutcome:
        """The highest scores stay; the tokens of the others go to nobody, unless they are dropped."""
        outcome = super().decide(inputs, scores_E, share)
        if not self.redirects:
            return outcome
        place = {old: new for new, old in enumerate(outcome.keep)}
        table = tuple(place.get(old) for old in range(inputs.experts))
        return outcome.model_copy(update={"redirect": table, "figures": self._figures(inputs, table)})

    def novices(self, inputs: LayerInputs, outcome: LayerOutcome) -> Tensor | None:
        """The constants, [E, H]; None where nothing answers."""
        return None if self.operator == "zero" else self.constants(inputs)

    def constants(self, inputs: LayerInputs) -> Tensor:
        """What would answer for each expert, [E, H] fp64; zeros where no token chose it."""
        seen = inputs.statistics
        if self.operator == "mean":
            return mean_rows(inputs.finite("output_sum"), seen.load_E)
        if self.operator == "g2":
            return mean_rows(inputs.finite("square_gated_output_sum"), seen["gate_square"])
        return torch.zeros_like(seen["output_sum"], dtype=torch.float64)

    def unseen(self, experts: Sequence[int], outcome: LayerOutcome) -> str:
        """Which of them answer zero."""
        gone = sorted(set(experts) - set(outcome.keep))
        if outcome.redirect is None or not gone:
            return super().unseen(experts, outcome)
        return (
            f"{super().unseen(experts, outcome)}; experts {', '.join(map(str, gone))} become novices that answer zero"
        )

    def _figures(self, inputs: LayerInputs, table: Sequence[int | None]) -> dict[str, float | list[float]]:
        """How much of the gates falls on novices, and which part of what their experts added they do not give."""
        gone = [old for old, new in enumerate(table) if new is None]
        if not gone:
            return {}
        seen = inputs.statistics
        whole_E = seen["gated_output_square"].double()
        left_E = errors_left(
            self.constants(inputs), seen["gate_square"], seen["square_gated_output_sum"], seen["gated_output_square"]
        )
        mass_E = seen["gate_mass"].double()
        return {
            "novices": float(len(gone)),
            "novice_gates": float(mass_E[gone].sum() / mass_E.sum().clamp_min(1e-300)),
            "novice_error": float(left_E[gone].sum() / whole_E[gone].sum().clamp_min(1e-300)),
        }
