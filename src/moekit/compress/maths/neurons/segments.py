"""Experts as sums of segments, and which segments of dropped experts are like one that stays (DERN, arXiv:2509.10377).

A segment is one neuron: its gate row, its up row and its down column. Where rows have biases, a row is continued by its
bias, the weight of a constant input 1. An expert is the sum of its segments, in whatever order.

Legend: E experts, I expert width, H hidden, F numbers of a segment or of what is compared of it, n some segments, D
experts that are taken apart (sources), M experts kept, N segments that meet in one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from moekit.compress.maths.clustering.spherical_kmeans import unit
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault

Compare = Literal["up_down", "all", "mean"]
Precision = Literal["fp32", "bf16"]
RouterShare = Literal["none", "add", "mean"]
# Segments at a time: a chunk of sources is compared with a chunk of targets, and nothing larger is ever held.
SOURCE_ROWS = 8192
TARGET_ROWS = 2048
# Similarities this close are a tie, which the lower expert wins: copies of a neuron differ by rounding alone.
_TIE = 1e-6
# Where less than this share of the dropped segments moves, the result is that of pruning.
NOTHING_MOVES = 0.05
_Block = tuple[int, slice]


def parts(weights: LayerWeights, expert: int, neurons: slice | Tensor = slice(None), *, balance: bool) -> list[Tensor]:
    """Some segments of an expert: gate rows (where there are gates), up rows and down columns, each [n, ...].

    Args:
        weights: of the layer.
        expert: which expert.
        neurons: which segments.
        balance: bring segments into the form of `balanced`.
    """

    def rows(matrix_EIH: Tensor, bias_EI: Tensor | None) -> Tensor:
        rows_nH = matrix_EIH[expert][neurons]
        return rows_nH if bias_EI is None else torch.cat([rows_nH, bias_EI[expert][neurons][:, None]], dim=1)

    up = rows(weights.up_EIH, weights.up_bias_EI)
    down_nH = weights.down_EHI[expert].T[neurons]
    if balance:
        up, down_nH = balanced(up, down_nH)
    return [*([] if (gate := weights.gate_EIH) is None else [rows(gate, weights.gate_bias_EI)]), up, down_nH]


def balanced(up_nH: Tensor, down_nH: Tensor) -> tuple[Tensor, Tensor]:
    """The form of each segment in which |up| = |down| and the largest number of up is positive, in fp32 or wider.

    A gated segment computes the same with c up and down / c, whatever c, also below 0; so neurons that do the same may
    look different. A segment whose up or down is zero keeps its scale.
    """
    wide = torch.promote_types(up_nH.dtype, torch.float32)
    up_nH, down_nH = up_nH.to(wide), down_nH.to(wide)
    up_n1, down_n1 = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (up_nH, down_nH))
    scale_n1 = torch.where((up_n1 > 0) & (down_n1 > 0), (down_n1 / up_n1).sqrt(), 1.0)
    largest_n1 = up_nH.gather(1, up_nH.abs().argmax(dim=1, keepdim=True))
    factor_n1 = torch.where(largest_n1 < 0, -scale_n1, scale_n1)
    return up_nH * factor_n1, down_nH / factor_n1


def gather(weights: LayerWeights, members: Sequence[tuple[int, Tensor]], *, balance: bool) -> Tensor:
    """Segments of several experts in one tensor, gate, up and down joined, [N, F] in the weights' dtype.

    Args:
        weights: of the layer.
        members: experts, each with the numbers of its neurons.
        balance: bring segments into the form of `balanced`.
    """
    return torch.cat([torch.cat(parts(weights, e, neurons, balance=balance), dim=1) for e, neurons in members])


def write_segments(weights: LayerWeights, expert: int, segments_IF: Tensor) -> None:
    """Write segments (gate, up and down joined, as `gather` gives them) into an expert, in place."""
    hidden = weights.hidden
    start = 0
    for matrix_EIH, bias_EI in ((weights.gate_EIH, weights.gate_bias_EI), (weights.up_EIH, weights.up_bias_EI)):
        if matrix_EIH is not None:
            matrix_EIH[expert].copy_(segments_IF[:, start : start + hidden])
            start += hidden
            if bias_EI is not None:
                bias_EI[expert].copy_(segments_IF[:, start])
                start += 1
    weights.down_EHI[expert].copy_(segments_IF[:, start:].T)


def comparable(
    weights: LayerWeights, expert: int, neurons: slice | Tensor, compare: Compare, *, balance: bool
) -> Tensor:
    """Vectors of some segments whose products are their similarities, [n, F] in fp32 (fp64 where weights are).

    Args:
        weights: of the layer.
        expert: which expert.
        neurons: which segments.
        compare: "up_down" is the cosine of up and down joined; "all" of gate, up and down; "mean" is the mean of the
            cosines of up and of down.
        balance: compare `balanced` segments.

    Raises:
        NumericFault: a segment holds NaN or infinity; names the expert.
    """
    found = [
        part.to(torch.promote_types(part.dtype, torch.float32))
        for part in parts(weights, expert, neurons, balance=balance)
    ]
    # All parts are looked at, since all of them go into the new segments.
    if not all(bool(part.sum().isfinite()) for part in found):
        raise NumericFault("neurons hold NaN or infinity", expert=expert, hint="look at the weights: `moekit check`")
    if compare == "mean":
        return torch.cat([unit(part) for part in found[-2:]], dim=1).mul_(0.5**0.5)
    return unit(torch.cat(found if compare == "all" else found[-2:], dim=1))


@dataclass(frozen=True, eq=False)
class Nearest:
    """For each segment of the sources the kept expert that has the segment most like it.

    Attributes:
        sources: experts that are taken apart.
        targets: experts that may receive.
        target_DI: the expert, int64; of equal similarities the first of `targets`.
        similarity_DI: the similarity, at most 1.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    target_DI: Tensor
    similarity_DI: Tensor

    def moved(self, target: int, alpha: float) -> dict[int, Tensor]:
        """Source -> neurons that move to a target because their similarity is above alpha; others are not named."""
        found_DI = (self.target_DI == target) & (self.similarity_DI > alpha)
        return {e: row.nonzero().flatten() for e, row in zip(self.sources, found_DI, strict=True) if bool(row.any())}

    def shares(self, experts: Sequence[int], alpha: float) -> Tensor:
        """Share of each source's segments that move to each of some experts, [len(experts), D] fp64."""
        above_DI = self.similarity_DI > alpha
        rows = [(above_DI & (self.target_DI == e)).double().mean(dim=1) for e in experts]
        return torch.stack(rows) if rows else above_DI.new_zeros(0, len(self.sources), dtype=torch.float64)


def moved_shares(nearest: Nearest, alpha: float) -> dict[int, float]:
    """Share of each source's segments that find a new home; the rest is discarded."""
    share_D = (nearest.similarity_DI > alpha).double().mean(dim=1)
    return dict(zip(nearest.sources, share_D.tolist(), strict=True))


def recombination_figures(nearest: Nearest, dropped: Sequence[int], alpha: float) -> dict[str, float]:
    """What became of the segments of dropped experts.

    Args:
        nearest: of those that are taken apart; other dropped experts have nothing to move.
        dropped: all dropped experts.
        alpha: similarity above which a segment moves.

    Returns:
        `moved_share` of all their segments, `moved_share_least` and `moved_share_most` of one expert, `similarity`
        (mean of the best similarities), `receiving` (kept experts that took segments) and `nothing_to_recombine`: 1
        where less than 5 % moved, so that the result is that of pruning.
    """
    found = moved_shares(nearest, alpha)
    shares = [found.get(e, 0.0) for e in dropped]
    moved = sum(shares) / max(len(shares), 1)
    return {
        "moved_share": moved,
        "moved_share_least": min(shares, default=0.0),
        "moved_share_most": max(shares, default=0.0),
        "similarity": float(nearest.similarity_DI.mean()) if nearest.sources else 0.0,
        "receiving": float(sum(bool(nearest.moved(e, alpha)) for e in nearest.targets)),
        "nothing_to_recombine": float(moved < NOTHING_MOVES),
    }


def nearest_targets(
    weights: LayerWeights,
    sources: Sequence[int],
    targets: Sequence[int],
    *,
    compare: Compare = "up_down",
    balance: bool = False,
    precision: Precision = "fp32",
    source_rows: int = SOURCE_ROWS,
    target_rows: int = TARGET_ROWS,
) -> Nearest:
    """Find for each segment of the sources the target with the segment most like it (arXiv:2509.10377, section 3).

    Two chunks are compared at a time, so that memory does not grow with experts or width.

    Args:
        weights: of the layer.
        sources: experts that are taken apart.
        targets: experts that may receive, at least one.
        compare: what similarity is, see `comparable`.
        balance: compare `balanced` segments.
        precision: "bf16" searches with products in bf16 and takes the similarity of what it found in fp32: faster on
            processors that have such instructions, but among segments that differ by less than about 0.004 any may win.
        source_rows: segments of sources at a time.
        target_rows: segments of targets at a time.

    Raises:
        NumericFault: weights hold NaN or infinity; names the expert.
    """
    kept = list(_blocks(targets, weights.width, target_rows))
    blocks = _blocks(sources, weights.width, source_rows)
    per_chunk = max(1, source_rows // weights.width)
    # Blocks come in the order of sources and neurons, so that what is found has only to be joined.
    target: list[Tensor] = [torch.zeros(0, dtype=torch.int64, device=weights.up_EIH.device)]
    similarity: list[Tensor] = [torch.zeros(0, device=weights.up_EIH.device)]
    while chunk := list(islice(blocks, per_chunk)):
        source_nF = torch.cat([comparable(weights, e, neurons, compare, balance=balance) for e, neurons in chunk])
        target_n, similarity_n = _best(weights, source_nF, kept, compare, balance, precision)
        target.append(target_n)
        similarity.append(similarity_n)
    shape = (len(sources), weights.width)
    return Nearest(tuple(sources), tuple(targets), torch.cat(target).view(shape), torch.cat(similarity).view(shape))


def _blocks(experts: Sequence[int], width: int, rows: int) -> Iterator[_Block]:
    for expert in experts:
        for start in range(0, width, rows):
            yield expert, slice(start, min(start + rows, width))


def _best(
    weights: LayerWeights,
    source_nF: Tensor,
    kept: Sequence[_Block],
    compare: Compare,
    balance: bool,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """Best target expert and similarity of each of some segments."""
    rough = precision == "bf16"
    left_nF = source_nF.bfloat16() if rough else source_nF
    best_n = source_nF.new_full((len(source_nF),), float("-inf"))
    expert_n, neuron_n = (torch.zeros_like(best_n, dtype=torch.int64) for _ in range(2))
    for expert, rows in kept:
        target_nF = comparable(weights, expert, rows, compare, balance=balance)
        value_n, index_n = (left_nF @ target_nF.to(left_nF.dtype).T).max(dim=1)
        better_n = value_n > best_n + _TIE
        best_n = torch.where(better_n, value_n.to(best_n.dtype), best_n)
        expert_n = expert_n.masked_fill(better_n, expert)
        neuron_n = torch.where(better_n, index_n + rows.start, neuron_n)
    if rough:
        for expert in sorted(set(expert_n.tolist())):
            mine_n = expert_n == expert
            target_nF = comparable(weights, expert, neuron_n[mine_n], compare, balance=balance)
            best_n[mine_n] = (source_nF[mine_n] * target_nF).sum(dim=1)
    return expert_n, best_n.clamp(max=1.0)


def share_router_rows(
    router: Mapping[str, Tensor], keep: Sequence[int], sources: Sequence[int], share_MD: Tensor, mode: RouterShare
) -> dict[str, Tensor]:
    """Router tensors of the kept experts after segments have moved.

    With G rows of a router tensor and rho the share of a source's segments that moved to r: "add" is G_r + sum_o rho_o
    G_o (arXiv:2509.10377); "mean" divides that by 1 + sum_o rho_o, so that logits keep their scale; "none" is G_r.

    Args:
        router: tensors with the expert axis first; biases are treated as weights are.
        keep: kept experts, in the order of the result.
        sources: experts that were taken apart.
        share_MD: rho, for each kept expert and source; rows without any keep their router row bit for bit.
        mode: see above.
    """
    result = {}
    for name, tensor in router.items():
        rows = tensor[list(keep)]
        if mode != "none" and tensor.is_floating_point() and sources:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            share = share_MD.to(tensor.device, wide)
            total_M = share.sum(dim=1).view(-1, *[1] * (rows.dim() - 1))
            mixed = rows.to(wide) + torch.tensordot(share, tensor[list(sources)].to(wide), dims=1)
            mixed = mixed / (1 + total_M) if mode == "mean" else mixed
            rows = torch.where(total_M > 0, mixed.to(tensor.dtype), rows)
        result[name] = rows
    return result
