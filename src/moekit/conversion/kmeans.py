"""Balanced k-means: clusters of (almost) equal size.

Shapes: N points, D dimensions, E clusters.
"""

from __future__ import annotations

import torch

SINKHORN_ROUNDS = 30
# Temperature of the soft assignment, relative to the spread of the costs of a point.
TEMPERATURE = 0.05
MAX_SWEEPS = 50
# Up to so many points the cheapest assignment is found exactly, within a second; time grows with the cube of N.
MOST_EXACT = 1024


def capacities(points: int, clusters: int) -> torch.Tensor:
    """Sizes that differ by at most one and sum to the number of points, int64 [E]."""
    return torch.tensor([points // clusters + (e < points % clusters) for e in range(clusters)])


def cluster_prices(cost_NE: torch.Tensor) -> torch.Tensor:
    """Price of each cluster at which about equally many points prefer each, [E].

    The dual of optimal transport, by Sinkhorn iterations (Cuturi, arXiv:1306.0895) at a low temperature.
    """
    clusters = cost_NE.shape[1]
    tau = TEMPERATURE * float(cost_NE.std(dim=1, correction=0).mean()) + 1e-30
    score_NE = -cost_NE / tau
    f_N = -score_NE.logsumexp(1)
    g_E = score_NE.new_zeros(clusters)
    for _ in range(SINKHORN_ROUNDS):
        g_E = -(score_NE + f_N[:, None]).logsumexp(0)
        f_N = -(score_NE + g_E).logsumexp(1)
    return -tau * (g_E - g_E.mean())


def balanced_assignment(cost_NE: torch.Tensor) -> torch.Tensor:
    """Assign points to clusters of equal size (sizes differ by at most one): at the least cost up to 1,024 points.

    Args:
        cost_NE: cost of each point in each cluster, finite.

    Returns:
        Cluster of each point, int64 [N].
    """
    if len(cost_NE) > MOST_EXACT:
        return near_assignment(cost_NE)
    from scipy.optimize import linear_sum_assignment

    cost_NE = cost_NE.detach().double().cpu()
    # A column for each place in a cluster.
    place_N = torch.arange(cost_NE.shape[1]).repeat_interleave(capacities(*cost_NE.shape))
    _, chosen_N = linear_sum_assignment(cost_NE[:, place_N].numpy())
    return place_N[torch.from_numpy(chosen_N)]


def near_assignment(cost_NE: torch.Tensor) -> torch.Tensor:
    """What `balanced_assignment` does with many points: cheap, and within some percent of the least cost.

    Every point takes its cheapest cluster at prices that balance demand; what is still too many in a cluster moves on,
    least loss first; then pairs of points swap clusters as long as that lowers the cost.

    Args:
        cost_NE: cost of each point in each cluster.

    Returns:
        Cluster of each point, int64 [N].
    """
    cost_NE = cost_NE.detach().double().cpu()
    points, clusters = cost_NE.shape
    priced_NE = cost_NE + cluster_prices(cost_NE)
    owner_N = priced_NE.argmin(1)
    free_E = capacities(points, clusters) - torch.bincount(owner_N, minlength=clusters)
    homeless = torch.cat(
        [_weakest(priced_NE, owner_N, e, -int(n)) for e, n in enumerate(free_E) if n < 0] or [owner_N[:0]]
    )
    free = free_E.clamp_min(0).tolist()
    ranked = priced_NE[homeless]
    order = (ranked.max(1).values - ranked.min(1).values).argsort(descending=True, stable=True)
    preference = ranked.argsort(dim=1, stable=True).tolist()
    for i in order.tolist():
        cluster = next(e for e in preference[i] if free[e])
        free[cluster] -= 1
        owner_N[homeless[i]] = cluster
    _swap(cost_NE, owner_N)
    return owner_N


def _weakest(priced_NE: torch.Tensor, owner_N: torch.Tensor, cluster: int, count: int) -> torch.Tensor:
    """The points of a cluster that lose least by moving to their second choice."""
    members = (owner_N == cluster).nonzero().flatten()
    if priced_NE.shape[1] == 1:
        return members[:0]
    two = priced_NE[members].topk(2, dim=1, largest=False).values
    return members[(two[:, 1] - two[:, 0]).argsort(stable=True)[:count]]


def _swap(cost_NE: torch.Tensor, owner_N: torch.Tensor) -> None:
    """Swap pairs of points between clusters until no swap helps, in place."""
    points, clusters = cost_NE.shape
    tolerance = 1e-12 * float(cost_NE.abs().max().clamp_min(1e-30))
    for _ in range(MAX_SWEEPS):
        move_NE = cost_NE - cost_NE[torch.arange(points), owner_N][:, None]
        cheapest_EE = torch.full((clusters, clusters), torch.inf, dtype=torch.float64)
        cheapest_EE.scatter_reduce_(0, owner_N[:, None].expand(-1, clusters), move_NE, "amin")
        gain_EE = (cheapest_EE + cheapest_EE.T).triu(1)
        pairs = (gain_EE < -tolerance).nonzero()
        if not len(pairs):
            return
        for p, q in pairs[gain_EE[pairs[:, 0], pairs[:, 1]].argsort()].tolist():
            _swap_pair(cost_NE, owner_N, p, q, tolerance)


def _swap_pair(cost_NE: torch.Tensor, owner_N: torch.Tensor, p: int, q: int, tolerance: float) -> None:
    # Costs of moving are independent between the two sides: the cheapest movers of each, paired in order, are optimal.
    in_p, in_q = (owner_N == p).nonzero().flatten(), (owner_N == q).nonzero().flatten()
    move_p, order_p = (cost_NE[in_p, q] - cost_NE[in_p, p]).sort()
    move_q, order_q = (cost_NE[in_q, p] - cost_NE[in_q, q]).sort()
    pairs = min(len(in_p), len(in_q))
    gainful = int((move_p[:pairs] + move_q[:pairs] < -tolerance).sum())
    owner_N[in_p[order_p[:gainful]]] = q
    owner_N[in_q[order_q[:gainful]]] = p


def balanced_kmeans(
    x_ND: torch.Tensor, clusters: int, generator: torch.Generator, *, iterations: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster points into groups of equal size by squared Euclidean distance.

    Args:
        x_ND: points.
        clusters: E, at most N.
        generator: random source of the starting centroids (k-means++).
        iterations: at most so many rounds of assignment and averaging.

    Returns:
        Cluster of each point [N] and centroids [E, D].
    """
    centroid_ED = _plus_plus(x_ND, clusters, generator)
    owner_N = torch.full((x_ND.shape[0],), -1)
    for _ in range(iterations):
        # |x|^2 is the same for all clusters and drops out
        new_N = balanced_assignment(centroid_ED.square().sum(1) - 2 * x_ND @ centroid_ED.T)
        if torch.equal(new_N, owner_N):
            break
        owner_N = new_N
        centroid_ED = cluster_means(x_ND, owner_N, clusters)
    return owner_N, centroid_ED


def cluster_means(x_ND: torch.Tensor, owner_N: torch.Tensor, clusters: int) -> torch.Tensor:
    """Mean of each cluster's points, [E, D]."""
    sums_ED = x_ND.new_zeros(clusters, x_ND.shape[1]).index_add_(0, owner_N.to(x_ND.device), x_ND)
    counts_E = torch.bincount(owner_N, minlength=clusters).clamp_min(1)
    return sums_ED / counts_E.to(x_ND)[:, None]


def _plus_plus(x_ND: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Starting centroids: far from each other, at random."""
    chosen = [int(torch.randint(x_ND.shape[0], (1,), generator=generator))]
    distance_N = (x_ND - x_ND[chosen[0]]).square().sum(1)
    for _ in range(clusters - 1):
        weight_N = distance_N.cpu().double().clamp_min(0) + 1e-30
        point = int(torch.multinomial(weight_N, 1, generator=generator))
        chosen.append(point)
        distance_N = torch.minimum(distance_N, (x_ND - x_ND[point]).square().sum(1))
    return x_ND[chosen].clone()
