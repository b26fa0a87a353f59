"""Figures of one layer's statistics: how even the load is, how selective experts are in their company.

An expert is *collaborative* if it fires together with many others, *specialised* if with few (arXiv:2504.01337). With
p_ij = C_ij / sum_j C_ij over the co-activation counts C without their diagonal::

    H_i = -sum_j p_ij ln p_ij        partners_i = exp(H_i)

Legend: N tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moekit.errors import BadData

# A partner counts as one if at least so much of an expert's company is with it.
PARTNER_SHARE = 0.05


class LoadBalance(BaseModel):
    """How evenly a layer's experts are used.

    Attributes:
        cv: standard deviation of the load (over the E experts, not E-1) divided by its mean.
        max_over_mean: load of the busiest expert divided by the mean.
        entropy: of the shares of the load, divided by ln E: 1 is perfectly even.
        never_routed: experts that no token chose.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cv: float
    max_over_mean: float
    entropy: float
    never_routed: int


class Collaboration(BaseModel):
    """How broadly a layer's experts fire together; means over the experts that fired together with any other.

    Attributes:
        entropy: H, nats.
        normalised_entropy: H / ln(E-1), 1 where all partners are equal.
        effective_partners: exp(H).
        degree: partners with a count above 0.
        degree_5_percent: partners with at least 5 % of an expert's company.
        top_partner_share: share of the most frequent partner.
        load: how even the load is.
        never_routed: experts left out, because they never fired with another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    entropy: float
    normalised_entropy: float
    effective_partners: float
    degree: float
    degree_5_percent: float
    top_partner_share: float
    load: LoadBalance
    never_routed: int


def load_balance(load_E: Tensor) -> LoadBalance:
    """Figures of a load.

    Args:
        load_E: tokens that chose each expert.

    Raises:
        BadData: no expert was ever chosen.
    """
    counts_E = load_E.double()
    total = float(counts_E.sum())
    if total <= 0:
        raise BadData("no expert was ever chosen: there is no load to describe", hint="record a text that is not empty")
    experts = len(counts_E)
    mean = total / experts
    entropy = float(torch.special.entr(counts_E / total).sum())
    return LoadBalance(
        cv=float(counts_E.std(correction=0)) / mean,
        max_over_mean=float(counts_E.max()) / mean,
        entropy=entropy / math.log(experts) if experts > 1 else 1.0,
        never_routed=int((counts_E == 0).sum()),
    )


def collaboration(coactivation_EE: Tensor, load_E: Tensor | None = None) -> Collaboration:
    """Figures of co-activation counts.

    Args:
        coactivation_EE: symmetric counts; its diagonal is the load, or left out as in published counts.
        load_E: tokens that chose each expert; None takes the diagonal, or where that is empty the row sums, which are
            (K-1) times the load.

    Raises:
        BadData: nothing ever fired together (K = 1, or no tokens).
    """
    counts_EE = coactivation_EE.double()
    if load_E is None:
        diagonal_E = counts_EE.diagonal()
        load_E = diagonal_E.clone() if bool((diagonal_E > 0).any()) else counts_EE.sum(1)
    company_EE = counts_EE.clone().fill_diagonal_(0)
    row_E = company_EE.sum(1)
    known = row_E > 0
    if not bool(known.any()):
        raise BadData("no two experts ever fired together", hint="co-activation needs a text, and two choices a token")
    share_EE = company_EE[known] / row_E[known, None]
    entropy_E = torch.special.entr(share_EE).sum(1)
    experts = counts_EE.shape[0]
    return Collaboration(
        entropy=float(entropy_E.mean()),
        normalised_entropy=float(entropy_E.mean()) / math.log(experts - 1) if experts > 2 else 1.0,
        effective_partners=float(entropy_E.exp().mean()),
        degree=float((share_EE > 0).double().sum(1).mean()),
        degree_5_percent=float((share_EE >= PARTNER_SHARE).double().sum(1).mean()),
        top_partner_share=float(share_EE.amax(1).mean()),
        load=load_balance(load_E),
        never_routed=int((~known).sum()),
    )


def mean_collaboration(layers: Sequence[Collaboration]) -> Collaboration:
    """Mean of every figure over layers; the numbers of experts never routed are added up.

    Raises:
        BadData: no layers.
    """
    if not layers:
        raise BadData("there is no layer to average over")

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values)

    load = LoadBalance(
        cv=mean([c.load.cv for c in layers]),
        max_over_mean=mean([c.load.max_over_mean for c in layers]),
        entropy=mean([c.load.entropy for c in layers]),
        never_routed=sum(c.load.never_routed for c in layers),
    )
    return Collaboration(
        entropy=mean([c.entropy for c in layers]),
        normalised_entropy=mean([c.normalised_entropy for c in layers]),
        effective_partners=mean([c.effective_partners for c in layers]),
        degree=mean([c.degree for c in layers]),
        degree_5_percent=mean([c.degree_5_percent for c in layers]),
        top_partner_share=mean([c.top_partner_share for c in layers]),
        load=load,
        never_routed=sum(c.never_routed for c in layers),
    )
