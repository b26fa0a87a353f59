"""Does the routing tell domains apart? Information and divergence between domains, with a shuffled baseline.

With counts n_de of domain d's tokens choosing expert e, and p = n / sum n::

    I = sum_de p_de ln(p_de / (p_d p_e))         NMI = 2 I / (H(domain) + H(expert))

NMI is 0 where every domain is routed alike and 1 where each domain has experts of its own. On finite text it is never
exactly 0, so it is compared with that of the same text under shuffled domain labels. Whole documents are relabelled,
not tokens: tokens of one document resemble each other whatever its domain.

Legend: N tokens, K choices a token, E experts, D domains, U units (documents or sequences), P permutations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moekit.errors import BadConfig, BadData

Unit = Literal["document", "sequence"]


class DomainReport(BaseModel):
    """How well a layer's routing tells domains apart.

    Attributes:
        information: mutual information of domain and chosen expert, nats.
        normalised: NMI, 0 to 1.
        shuffled: mean NMI under shuffled labels.
        shuffled_high: its 95th percentile.
        p_value: share of shuffles (the true labels counted in) that reach the true NMI.
        excess: NMI minus its mean under shuffled labels.
        divergence: mean Jensen-Shannon divergence between two domains' loads, 0 (alike) to 1 (disjoint).
        unit: what was relabelled.
        units: how many of them.
        permutations: how many shuffles.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    information: float
    normalised: float
    shuffled: float
    shuffled_high: float
    p_value: float
    excess: float
    divergence: float
    unit: Unit
    units: int
    permutations: int


def _entropy(share: Tensor, dim: int) -> Tensor:
    entropy: Tensor = torch.special.entr(share).sum(dim)
    return entropy


def domain_information(domain_load_DE: Tensor) -> tuple[Tensor, Tensor]:
    """Mutual information of domain and chosen expert.

    Args:
        domain_load_DE: counts [..., D, E]; leading axes are separate tables.

    Returns:
        (information in nats [...], NMI [...], normalised by the arithmetic mean of both entropies; 0 where both are 0).
    """
    counts = domain_load_DE.double()
    share = counts / counts.sum((-2, -1), keepdim=True).clamp_min(1.0)
    of_domain, of_expert = _entropy(share.sum(-1), -1), _entropy(share.sum(-2), -1)
    both = torch.special.entr(share).sum((-2, -1))
    information = (of_domain + of_expert - both).clamp_min(0.0)
    total = of_domain + of_expert
    return information, torch.where(total > 0, 2 * information / total.clamp_min(1e-300), 0.0)


def domain_divergence(domain_load_DE: Tensor) -> Tensor:
    """Jensen-Shannon divergence between the loads of each two domains, in bits: 0 alike, 1 disjoint.

    Args:
        domain_load_DE: tokens of each domain that chose each expert.

    Returns:
        [D, D] fp64, symmetric, diagonal 0; NaN for a domain without tokens.
    """
    counts_DE = domain_load_DE.double()
    share_DE = counts_DE / counts_DE.sum(1, keepdim=True)
    middle_DDE = (share_DE[:, None] + share_DE[None]) / 2
    own_D = _entropy(share_DE, -1)
    divergence_DD = _entropy(middle_DDE, -1) - (own_D[:, None] + own_D[None]) / 2
    return (divergence_DD / math.log(2)).clamp(0.0, 1.0).fill_diagonal_(0.0)


def unit_loads(indices_NK: Tensor, unit_N: Tensor, experts: int) -> Tensor:
    """Load of each unit (document, sequence): [U, E] int64, units by ascending number."""
    _, place_N = torch.unique(unit_N, return_inverse=True)
    units = int(place_N.max()) + 1 if len(place_N) else 0
    cell_NK = place_N[:, None] * (experts + 1) + indices_NK.long()
    table = torch.bincount(cell_NK.flatten(), minlength=units * (experts + 1))
    return table.view(units, experts + 1)[:, :experts]


def domain_report(
    indices_NK: Tensor,
    domain_N: Tensor,
    unit_N: Tensor,
    experts: int,
    *,
    unit: Unit = "document",
    permutations: int = 200,
    seed: int = 0,
) -> DomainReport:
    """How well a layer's choices tell domains apart, and whether that could be chance.

    Args:
        indices_NK: chosen experts; E means none.
        domain_N: number of each token's domain.
        unit_N: number of each token's document or sequence.
        experts: E.
        unit: what `unit_N` numbers.
        permutations: how many times to shuffle the labels of units.
        seed: of the shuffles.

    Raises:
        BadConfig: no permutations.
        BadData: fewer than two domains, or as many domains as units, so that shuffling shows nothing.
    """
    if permutations < 1:
        raise BadConfig(f"{permutations} permutations", hint="give at least 1; 200 settle a p-value of 0.005")
    # A packed sequence may hold two domains: each part is a unit of its own.
    stride = int(domain_N.max()) + 1 if len(domain_N) else 1
    pair_N = unit_N.long() * stride + domain_N.long()
    loads_UE = unit_loads(indices_NK, pair_N, experts).double()
    _, label_U = torch.unique(torch.unique(pair_N) % stride, return_inverse=True)
    domains = int(label_U.max()) + 1 if len(label_U) else 0
    if domains < 2 or len(label_U) <= domains:
        raise BadData(
            f"{len(label_U)} {unit}s of {domains} domains cannot show whether routing tells domains apart",
            hint="record at least two domains, and several documents of them",
        )
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(len(label_U))]
    orders += [torch.randperm(len(label_U), generator=generator) for _ in range(permutations)]
    tables = torch.stack([torch.zeros(domains, experts).double().index_add_(0, label_U[o], loads_UE) for o in orders])
    information, normalised = domain_information(tables)
    truth, shuffled = float(normalised[0]), normalised[1:]
    divergence_DD = domain_divergence(tables[0])
    return DomainReport(
        information=float(information[0]),
        normalised=truth,
        shuffled=float(shuffled.mean()),
        shuffled_high=float(shuffled.quantile(0.95)),
        p_value=(1 + int((shuffled >= truth - 1e-12).sum())) / (1 + permutations),
        excess=truth - float(shuffled.mean()),
        divergence=float(divergence_DD[torch.triu(torch.ones_like(divergence_DD), 1) > 0].nanmean()),
        unit=unit,
        units=len(label_U),
        permutations=permutations,
    )


def choose_unit(document_N: Tensor, domain_N: Tensor) -> Unit:
    """Documents where every domain has several of them, else sequences."""
    pairs = torch.unique(torch.stack([domain_N.long(), document_N.long()]), dim=1)
    _, counts = torch.unique(pairs[0], return_counts=True)
    return "document" if len(counts) and int(counts.min()) > 1 else "sequence"


def mean_report(reports: Sequence[DomainReport]) -> dict[str, float]:
    """Means over layers of the figures that are comparable between layers.

    Raises:
        BadData: no layers.
    """
    if not reports:
        raise BadData("there is no layer to average over")
    names = ("information", "normalised", "shuffled", "excess", "divergence")
    return {name: math.fsum(getattr(r, name) for r in reports) / len(reports) for name in names}
