"""Massive activations: single values of the residual stream far above all others, and what a layer adds to them.

Sun et al. (arXiv:2402.17762) call a value massive that exceeds 100 and about 1,000 times the median. The median here is
that of the whole layer, read off a histogram so that sets of tokens merge exactly; the token's own median misses tokens
whose whole vector is blown up (SmolLM2-135M: 25,600 on a token whose median is 50, in a layer whose median is 1.7).

Legend: N tokens, H hidden, B bins of log2 |value|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.batch import TokenBatch, widest
from moekit.trace.vocabulary import BINS, statistic

# Sun et al. 2024, section 2.
MASSIVE_VALUE = 100.0
MASSIVE_RATIO = 1000.0
# 2^-16 to 2^16 in steps of a sixteenth of an octave: a median is exact to 2 %.
_PER_OCTAVE, _LOWEST_OCTAVE = 16, -16
# Values binned at a time, so that their bin numbers stay small beside the activations.
_CHUNK_VALUES = 1 << 21


def is_massive(values: Tensor, median: Tensor | float) -> Tensor:
    """Where |value| exceeds both 100 and 1,000 times a median; of the same shape, bool."""
    magnitude = values.abs()
    return (magnitude > MASSIVE_VALUE) & (magnitude > MASSIVE_RATIO * median)


def _peak(values_NH: Tensor, seen: TokenBatch) -> Tensor:
    """(value, channel, position) of the largest value, [3]."""
    place = values_NH.argmax()
    token, channel = place // values_NH.shape[1], place % values_NH.shape[1]
    found = (values_NH.flatten()[place], channel, seen.position_N[token])
    return torch.stack([figure.to(widest(values_NH.device)) for figure in found])


@statistic(shape="V", sources=("shared",), rule="peak")
def shared_peak(seen: TokenBatch) -> Tensor:
    """Largest absolute output of the shared experts: value, channel, position (arXiv:2507.23279)."""
    return _peak(seen.shared_NH.abs(), seen)


@statistic(shape="V", sources=("stream",), rule="peak")
def stream_peak(seen: TokenBatch) -> Tensor:
    """Largest absolute value of the residual stream after the layer: value, channel, position."""
    return _peak(seen.stream_NH.abs(), seen)


@statistic(shape="V", sources=("residual", "stream"), rule="peak")
def stream_gain(seen: TokenBatch) -> Tensor:
    """Most that the block adds to the magnitude of one value of the residual stream: gain, channel, position.

    A gain is |H_tc| after the layer less |H_tc| before the block, attention's part included in the latter; blocks that
    only take away keep 0.
    """
    assert seen.residual is not None
    return _peak(seen.stream_NH.abs() - seen.residual.float().abs(), seen)


@statistic(shape="B", sources=("stream",), integer=True)
def stream_magnitude(seen: TokenBatch) -> Tensor:
    """Values of the residual stream after the layer, counted by log2 |value| in 512 bins from 2^-16 to 2^16."""
    counts_B = torch.zeros(BINS, dtype=torch.int64, device=seen.stream_NH.device)
    for part in torch.split(seen.stream_NH.flatten(), _CHUNK_VALUES):
        octave = part.abs().log2().nan_to_num(_LOWEST_OCTAVE)  # infinities become finite and are clamped
        bins = ((octave - _LOWEST_OCTAVE) * _PER_OCTAVE).clamp(0, BINS - 1).long()
        counts_B += torch.bincount(bins, minlength=BINS)
    return counts_B


def median_magnitude(counts_B: Tensor) -> float:
    """Lower median of |value| from `stream_magnitude`, the (geometric) middle of its bin; 0 where nothing was seen."""
    total = int(counts_B.sum())
    if not total:
        return 0.0
    place = int((counts_B.cumsum(0) < (total + 1) // 2).sum())
    return float(2.0 ** ((place + 0.5) / _PER_OCTAVE + _LOWEST_OCTAVE))


def _token_medians(stream_NH: Tensor) -> Tensor:
    return stream_NH.abs().median(dim=1).values.clamp_min(torch.finfo(stream_NH.dtype).tiny)


@statistic(shape="V", sources=("stream",), rule="peak")
def stream_ratio_peak(seen: TokenBatch) -> Tensor:
    """Largest ratio of |H_tc| to its token's (lower) median |H_t| after the layer: ratio, channel, position."""
    stream_NH = seen.stream_NH
    return _peak(stream_NH.abs() / _token_medians(stream_NH)[:, None], seen)


@statistic(shape="", sources=("stream",), integer=True)
def massive_tokens(seen: TokenBatch) -> Tensor:
    """Tokens with a value above 100 and above 1,000 times their own median after the layer (arXiv:2402.17762)."""
    stream_NH = seen.stream_NH
    return is_massive(stream_NH.abs().amax(1), _token_medians(stream_NH)).sum()
