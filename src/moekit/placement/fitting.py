"""Latency and bandwidth of a link from measured transfers: seconds = alpha + bytes / bandwidth.

Least squares of *relative* errors: transfers of a few bytes and of many megabytes count alike, as they should where the
measurements' noise grows with their length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moekit.errors import BadData
from moekit.placement.topology import Topology


@dataclass(frozen=True)
class LineFit:
    """seconds = offset + slope * size.

    Attributes:
        offset: seconds at size 0, never negative.
        slope: seconds for each unit of size.
        errors: predicted over measured, less 1, for each sample in the order given.
    """

    offset: float
    slope: float
    errors: tuple[float, ...]

    def seconds(self, size: float) -> float:
        """Predicted time."""
        return self.offset + self.slope * size

    @property
    def worst(self) -> float:
        """Largest relative error of any sample, without its sign."""
        return max(abs(error) for error in self.errors)

    @property
    def mean(self) -> float:
        """Mean relative error, without signs."""
        return sum(abs(error) for error in self.errors) / len(self.errors)


@dataclass(frozen=True)
class LinkFit(LineFit):
    """A link: `alpha` seconds before the first byte, then `bandwidth` bytes a second."""

    @property
    def alpha(self) -> float:
        """Seconds before the first byte."""
        return self.offset

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return 1.0 / self.slope


def fit_line(samples: Iterable[tuple[float, float]]) -> LineFit:
    """Fit seconds over size, say rows or tokens.

    Args:
        samples: pairs of size and measured seconds.

    Raises:
        BadData: fewer than two different sizes, times that are not positive, or time that does not grow with size.
    """
    points = [(float(size), float(seconds)) for size, seconds in samples]
    if len({size for size, _ in points}) < 2:
        raise BadData("a line needs samples of at least two sizes", hint="measure a small and a large transfer")
    for size, seconds in points:
        if not (math.isfinite(size) and math.isfinite(seconds) and size >= 0 and seconds > 0):
            raise BadData(f"{seconds} seconds for size {size} is no measurement", hint="leave it out")
    weights = [seconds**-2 for _, seconds in points]
    total = sum(weights)
    mean_size = sum(w * size for w, (size, _) in zip(weights, points, strict=True)) / total
    mean_time = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    spread = sum(w * (size - mean_size) ** 2 for w, (size, _) in zip(weights, points, strict=True))
    shared = sum(w * (s - mean_size) * (t - mean_time) for w, (s, t) in zip(weights, points, strict=True))
    slope = shared / spread
    offset = mean_time - slope * mean_size
    if offset < 0:
        # No transfer ends before it begins: the best line through the origin instead.
        offset = 0.0
        squares = sum(w * size**2 for w, (size, _) in zip(weights, points, strict=True))
        slope = sum(w * size * seconds for w, (size, seconds) in zip(weights, points, strict=True)) / squares
    if slope <= 0:
        raise BadData(
            "measured times do not grow with size: nothing can be said about the bandwidth",
            hint="measure larger transfers, where bytes and not latency decide",
        )
    return LineFit(offset, slope, tuple((offset + slope * size) / seconds - 1 for size, seconds in points))


def fit_link(samples: Iterable[tuple[float, float]]) -> LinkFit:
    """Latency and bandwidth of a link.

    Args:
        samples: pairs of bytes through the busiest port, in one direction, and measured seconds.

    Raises:
        BadData: see `fit_line`.
    """
    line = fit_line(samples)
    return LinkFit(line.offset, line.slope, line.errors)


def calibrated(topology: Topology, *, intra: LinkFit | None = None, inter: LinkFit | None = None) -> Topology:
    """A topology whose links are as measured; those not given stay."""
    values: dict[str, float] = {}
    if intra is not None:
        values |= {"intra": intra.bandwidth, "intra_latency": intra.alpha}
    if inter is not None:
        values |= {"inter": inter.bandwidth, "inter_latency": inter.alpha}
    return topology.model_copy(update=values)
