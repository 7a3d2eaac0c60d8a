"""What "When Test-Time Training Fails" reports, and whether the results of this study agree.

A claim is a difference of two numbers, each over many settings and steps: the best value of one
side against the best of the other, the worst, the mean. Both sides have the same settings but for
what is compared, and the same prompts, so the interval is that of the difference when the prompts
are drawn again: 1000 times with replacement, in whole clusters where there are clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ttt_fast.study.analysis import Analysis
from ttt_fast.study.grid import Setting
from ttt_fast.study.intervals import Estimate, spearman

HOLDS, OPPOSITE, OPEN = "holds", "the opposite", "cannot be told"
_DRAWS = 1000

Place = tuple[Setting, int]
# Of the mean values at some places, in their order.
Statistic = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Finding:
    """A claim, and what there is to say of it.

    Attributes:
        claim: what was reported.
        sides: what is compared, in words.
        values: the two numbers.
        difference: how far the first is better than the second, with its interval; n are prompts.
        n_places: settings and steps on each side.
    """

    claim: str
    sides: tuple[str, str]
    values: tuple[float, float]
    difference: Estimate
    n_places: tuple[int, int]

    @property
    def verdict(self) -> str:
        """Whether the interval lies above 0, below it, or on both sides."""
        if self.difference.low > 0:
            return HOLDS
        return OPPOSITE if self.difference.high < 0 else OPEN


def findings(analysis: Analysis) -> list[Finding]:
    """Every claim of which the settings of a study have both sides.

    Settings and steps at which a likelihood is not finite are left out.
    """
    places = [
        (setting, cell.step)
        for setting, curve in analysis.curves.items()
        for cell in curve
        if cell.step > 0 and cell.value.n == cell.n_prompts
    ]
    sign = -1.0 if analysis.less_is_better else 1.0
    found = []
    for claim, axis, sides, (one, other), statistic in _claims(places):
        first, second = _matched(places, axis, one, other)
        if first:
            both = ((first, statistic), (second, statistic))
            found.append(_compare(analysis, claim, sides, both, sign))
    return found + _spread_over_lr(analysis, places)


def correlation(analysis: Analysis, predictor: str) -> Estimate:
    """Spearman's, of less of a predictor with a better value, over settings and steps.

    Of the points of :meth:`Analysis.points`, on the prompts that have all of them; the interval is
    of prompts that are drawn again.
    """
    places = [(setting, step) for setting, step, *_ in analysis.points(predictor)]
    if not places:
        return Estimate(math.nan, math.nan, math.nan, 0)

    def pair_of(line: Mapping[str, Any]) -> tuple[float | None, float | None]:
        less = line[predictor]
        return None if less is None else -less, analysis.goodness_of(line)

    values, clusters = _table(analysis, places, pair_of)
    whole = _rank(values.mean(0)) if len(values) else math.nan
    return _estimate(whole, [_rank(means) for means in _drawn_means(values, clusters)], len(values))


def _rank(means: np.ndarray) -> float:
    rank = spearman(means[:, 0].tolist(), means[:, 1].tolist())
    return 0.0 if math.isnan(rank) else rank  # what does not vary tells nothing


def _claims(
    places: Sequence[Place],
) -> list[tuple[str, str, tuple[str, str], tuple[Any, Any], Statistic]]:
    """Claim, axis, names of the sides, their values on it, and what counts of each side."""

    def values(axis: str) -> list[float]:
        return sorted({getattr(setting, axis) for setting, _ in places} - {None})

    claims = [
        ("SGD does better than AdamW, each at its best", "optimizer", ("SGD", "AdamW"),
         ("sgd", "adamw"), np.max),
        ("Feed-forward weights alone do better than all, each at its best",
         "scope", ("ffn", "all"), ("ffn", "all"), np.max),
        ("Attention weights alone are safer than all, each at its worst",
         "scope", ("attention", "all"), ("attention", "all"), np.min),
    ]  # fmt: skip
    for clip in values("max_grad_norm")[:1]:
        claims.append(("Clipping spares the worst drops, each at its worst", "max_grad_norm",
                       (f"clip {clip:g}", "no clip"), (clip, None), np.min))  # fmt: skip
    for axis, name in (("momentum", "Momentum"), ("weight_decay", "Weight decay")):
        least, *_, most = values(axis) * 2 or (0, 0)
        if most > least:
            claims.append((f"{name} helps, in the mean", axis,
                           (f"{most:g}", f"{least:g}"), (most, least), np.mean))  # fmt: skip
    return claims


def _matched(
    places: Iterable[Place], axis: str, one: Hashable, other: Hashable
) -> tuple[list[Place], list[Place]]:
    """Places with either value of an axis that have a counterpart, equal in all else."""
    # AdamW has no momentum to be equal in.
    free = {axis: None} | ({"momentum": 0.0} if axis == "optimizer" else {})
    sides: tuple[dict[Hashable, list[Place]], ...] = ({}, {})
    for setting, step in places:
        for side, value in zip(sides, (one, other), strict=True):
            if getattr(setting, axis) == value:
                side.setdefault((replace(setting, **free), step), []).append((setting, step))
    shared = [key for key in sides[0] if key in sides[1]]
    first, second = ([place for key in shared for place in side[key]] for side in sides)
    return first, second


def _spread_over_lr(analysis: Analysis, places: Sequence[Place]) -> list[Finding]:
    """Whether clipping makes the learning rate matter less."""
    last = max((step for _, step in places), default=0)
    clips = sorted({s.max_grad_norm for s, _ in places if s.max_grad_norm is not None})
    if not clips:
        return []
    ends = [place for place in places if place[1] == last]
    clipped, free = _matched(ends, "max_grad_norm", clips[0], None)
    if len({setting.lr for setting, _ in clipped}) < 2:
        return []
    both = ((clipped, _minus_spread(clipped)), (free, _minus_spread(free)))
    claim = "Clipping makes the learning rate matter less (spread over lr, last step)"
    return [_compare(analysis, claim, (f"clip {clips[0]:g}", "no clip"), both, sign=-1.0)]


def _minus_spread(places: Sequence[Place]) -> Statistic:
    """Largest minus smallest value over lr, the mean over all other settings; less is better."""
    groups: dict[Setting, list[int]] = {}
    for n, (setting, _) in enumerate(places):
        groups.setdefault(replace(setting, lr=0.0), []).append(n)
    indices = [group for group in groups.values() if len(group) > 1]
    return lambda means: -float(np.mean([np.ptp(means[group]) for group in indices]))


# ---------------------------------------------------------------------------- the same prompts


def _compare(
    analysis: Analysis,
    claim: str,
    sides: tuple[str, str],
    both: tuple[tuple[Sequence[Place], Statistic], tuple[Sequence[Place], Statistic]],
    sign: float,
) -> Finding:
    """A finding; ``sign`` gives a statistic, of which more is better, the sign of the metric."""
    (first, of_first), (second, of_second) = both
    n = len(first)
    values, clusters = _table(
        analysis, [*first, *second], lambda line: (analysis.goodness_of(line),)
    )

    def numbers(means: np.ndarray) -> tuple[float, float]:
        return float(of_first(means[:n, 0])), float(of_second(means[n:, 0]))

    a, b = numbers(values.mean(0)) if len(values) else (math.nan, math.nan)
    draws = [x - y for x, y in map(numbers, _drawn_means(values, clusters))]
    difference = _estimate(a - b, draws, len(values))
    return Finding(claim, sides, (sign * a, sign * b), difference, (n, len(second)))


def _table(
    analysis: Analysis,
    places: Sequence[Place],
    numbers_of: Callable[[Mapping[str, Any]], tuple[float | None, ...]],
) -> tuple[np.ndarray, list[Hashable]]:
    """Numbers of the prompts that have all of them at all places, and the prompts' clusters.

    Returns:
        (prompts, places, numbers) float64, and a cluster each.
    """
    lines = [analysis.lines_of(*place) for place in places]
    rows, clusters = [], []
    for prompt in sorted(set.intersection(*map(set, lines))):
        row = [numbers_of(each[prompt]) for each in lines]
        if not any(None in numbers for numbers in row):
            rows.append(row)
            clusters.append(lines[0][prompt].get("cluster", prompt))
    return np.array(rows, dtype=np.float64), clusters


def _drawn_means(values: np.ndarray, clusters: Sequence[Hashable]) -> Iterable[np.ndarray]:
    """Means over the prompts, drawn again; nothing where there are fewer than two clusters."""
    numbers = {cluster: n for n, cluster in enumerate(dict.fromkeys(clusters))}
    n = len(numbers)
    if n < 2:
        return []
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_DRAWS)
    weights = counts[:, [numbers[cluster] for cluster in clusters]].astype(np.float64)
    weights /= weights.sum(1, keepdims=True)
    return np.tensordot(weights, values, axes=1)


def _estimate(whole: float, draws: Sequence[float], n: int) -> Estimate:
    if not draws:
        return Estimate(whole, math.nan, math.nan, n)
    low, high = np.percentile(draws, [2.5, 97.5]).tolist()
    return Estimate(whole, low, high, n)
