"""Confidence intervals and rank correlations of small samples."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Z = 1.959963984540054  # 95 %


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; NaN where there is nothing, or too little for an interval.

    Attributes:
        mean: of the values.
        low: end of the interval.
        high: likewise.
        n: how many values.
    """

    mean: float
    low: float
    high: float
    n: int


_NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a share; n may be an effective number."""
    if n <= 0:
        return math.nan, math.nan
    share, z2 = successes / n, Z * Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Rounding may put an end a hair beyond a share of 0 or 1.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def share_estimate(right: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """A share of right answers; with clusters, Wilson's interval of the effective sample size.

    The effective size is the one at which independent answers would have the variance that the
    means of clusters show: p(1 − p) / Var. Where all answers agree, it is the number of clusters.
    """
    n = len(right)
    if n == 0:
        return _NOTHING
    share = sum(right) / n
    size = float(n)
    if clusters is not None:
        variance = _clustered_variance(list(map(float, right)), clusters)
        n_clusters = len(set(clusters))
        size = share * (1 - share) / variance if variance > 0 else float(n_clusters)
        # Clusters that differ less than chance would have it do not make more of few answers.
        size = min(max(size, 1.0), float(n))
    low, high = wilson(share * size, size)
    return Estimate(share, low, high, n)


def mean_estimate(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """A mean with a normal interval; clustered where there are clusters."""
    n = len(values)
    if n == 0:
        return _NOTHING
    mean = math.fsum(values) / n
    each = clusters if clusters is not None else range(n)
    if len(set(each)) < 2:
        return Estimate(mean, math.nan, math.nan, n)
    half = Z * math.sqrt(_clustered_variance(values, each))
    return Estimate(mean, mean - half, mean + half, n)


def _clustered_variance(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Variance of the mean, from the sums of the residuals of each cluster."""
    n = len(values)
    mean = math.fsum(values) / n
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    count = len(sums)
    if count < 2:
        return 0.0
    return count / (count - 1) * math.fsum(s * s for s in sums.values()) / (n * n)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties with their mean rank; NaN where one of them does not vary."""
    a, b = _ranks(x), _ranks(y)
    if len(a) < 2:
        return math.nan
    mean = (len(a) + 1) / 2
    a, b = [rank - mean for rank in a], [rank - mean for rank in b]
    scale = math.sqrt(math.fsum(r * r for r in a) * math.fsum(r * r for r in b))
    if scale == 0:
        return math.nan
    return math.fsum(p * q for p, q in zip(a, b, strict=True)) / scale


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and values[order[last + 1]] == values[order[first]]:
            last += 1
        for place in order[first : last + 1]:
            ranks[place] = (first + last) / 2 + 1
        first = last + 1
    return ranks
