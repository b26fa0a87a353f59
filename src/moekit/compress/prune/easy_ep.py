"""EASY-EP: pruning for one domain from a few of its texts (NeurIPS 2025, arXiv:2504.06792).

g is the gate weight that multiplies an expert's output, n the norm of that output before gating, w how much the routed
experts turn the token's residual stream.

Legend: N tokens, K choices a token, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod, ratio
from moekit.compress.engine.inputs import LayerInputs
from moekit.errors import BadConfig
from moekit.trace.batch import TokenBatch, widest
from moekit.trace.vocabulary import statistic


def by_domain(seen: TokenBatch, values_NK: Tensor) -> Tensor:
    """Sum over each domain's tokens of a value of each choice, by expert: [D, E] fp64."""
    wide = widest(values_NK.device)
    sum_DE = torch.zeros(seen.domains, seen.experts, dtype=wide, device=values_NK.device)
    return sum_DE.index_add_(0, seen.domain_N, seen.spread(values_NK).to(wide))


@statistic(shape="DE", sources=("weights", "outputs"))
def domain_gated_output_norm(seen: TokenBatch) -> Tensor:
    """Sum of g n over the expert's tokens of each domain; over all domains it is `gated_output_norm`."""
    return by_domain(seen, seen.weights_NK * seen.output_norm_NK)


@statistic(shape="DE", sources=("weights", "outputs", "residual"))
def domain_residual_change_weighted_output_norm(seen: TokenBatch) -> Tensor:
    """Sum of w g n over the expert's tokens of each domain: `residual_change_weighted_output_norm` by domain."""
    return by_domain(seen, seen.change_N[:, None] * seen.weights_NK * seen.output_norm_NK)


def mix_domains(sums_DE: Tensor, domains: Sequence[str], weights: Mapping[str, float]) -> Tensor:
    """Give each domain the same say, whatever its length: sum over domains of v_d I_d / sum_i I_d,i.

    Args:
        sums_DE: importance of each expert on each domain's tokens.
        domains: their names.
        weights: v of domains by name; 1 for those not named.

    Returns:
        [E] fp64; a domain whose importances are all 0 adds nothing.

    Raises:
        BadConfig: a weight for a domain that is not there, or every domain weighs 0.
    """
    if strange := sorted(set(weights) - set(domains)):
        raise BadConfig(
            f"domain_weights names {', '.join(map(repr, strange))}, which the calibration text does not hold",
            hint=f"its domains are {', '.join(map(repr, domains))}",
        )
    weight_D = torch.tensor([weights.get(name, 1.0) for name in domains], dtype=torch.float64, device=sums_DE.device)
    if not bool((weight_D > 0).any()):
        raise BadConfig("every domain weighs 0", hint="give at least one domain a positive weight")
    share_DE = ratio(sums_DE, sums_DE.double().sum(1, keepdim=True).expand_as(sums_DE))
    return weight_D @ share_DE


@register(
    name="easy-ep",
    kind="prune",
    paper="arXiv:2504.06792",
    needs=("load", "domain_residual_change_weighted_output_norm"),
    changes="weights",
    limits=(
        "For the domain of its calibration text only: other domains lose far more.",
        "Calibrate on prompts with the model's own answers (moekit.compress.self_calibration); long texts weigh more.",
    ),
)
class EasyEP(PruneMethod):
    """Keep the experts that do most, in total, on the tokens that the routed experts change most.

    I_i = sum over the tokens of w_t g_ti n_ti: g is the gate weight, n = ||E_i(u_t)|| the norm of the output it
    multiplies, and w_t = max(1 - cos(h_t, h_t + sum_i g_ti E_i(u_t)), 0) how far the routed experts turn the residual
    stream h; shared experts do not count. A plain sum, so that frequency counts. Several domains in one model: each
    domain's I is divided by its sum over the experts, then added with the domain's weight. Choose it to serve one
    domain, or a few, of which some 25 texts are at hand; a method that averages per token (reap) for all purposes.
    """

    mix: Literal["auto", "sum", "domains"] = Field(
        default="auto",
        description="several domains: one plain sum over all tokens, or each domain normalised and then added; auto "
        "normalises where there are several domains",
    )
    domain_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="how much a domain counts, by its name, ≥ 0; 1 for those not named"
    )
    token_weight: bool = Field(
        default=True, description="weigh tokens by how far the routed experts turn them; off is weighted EAN"
    )

    @model_validator(mode="after")
    def _weights_are_used(self) -> EasyEP:
        if self.mix == "sum" and self.domain_weights:
            raise ValueError("a plain sum knows no domains: leave domain_weights out, or mix=domains")
        return self

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[PruneMethod]:
        """All ways to mix, with and without token weights."""
        return [cls(), cls(mix="sum"), cls(mix="domains", token_weight=False)]

    @property
    def required(self) -> tuple[str, ...]:
        """The load and the sum of (w) g n, by domain unless all tokens are summed alike."""
        whole = "residual_change_weighted_output_norm" if self.token_weight else "gated_output_norm"
        return ("load", whole if self.mix == "sum" else f"domain_{whole}")

    def score(self, inputs: LayerInputs) -> Tensor:
        """Importance of each expert, [E]: the plain sum, or the weighted sum of the domains' shares.

        Raises:
            BadConfig: weights for domains that are not there.
        """
        sums = inputs.statistics[self.required[1]].double()
        if self.mix == "sum":
            return sums
        domains = inputs.statistics.domains
        if self.mix == "auto" and len(domains) < 2 and not self.domain_weights:
            return sums.sum(0)
        return mix_domains(sums, domains, self.domain_weights)
