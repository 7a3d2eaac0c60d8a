"""What "When Test-Time Training Fails" reports, and whether the results of this study agree.

A claim is a difference of two numbers, each over many settings and steps: the best value of one
side against the best of the other, the worst, the mean. Both sides have the same settings but for
what is compared, and the same prompts, so the interval is that of the difference when the prompts
are drawn again: 1000 times with replacement, in whole clusters where there are clusters (a paired
bootstrap). With few prompts such an interval is a little too narrow.
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
# Losses of the prompts that are called equal are no farther apart than by this factor.
_EQUAL_LOSS = 1.5

Place = tuple[Setting, int]
# Of the mean values at some places, in their order.
Statistic = Callable[[np.ndarray], float]
_HOW: dict[str, Statistic] = {
    "each at its best": np.max, "each at its worst": np.min, "in the mean": np.mean,
}  # fmt: skip


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
    places = sound_places(analysis)
    sign = -1.0 if analysis.less_is_better else 1.0
    found = [] if analysis.metric == "loss" else _unadapted(analysis, places, sign)
    for claim, axis, sides, (one, other), hows in _claims(analysis.metric, places):
        first, second = _matched(places, axis, one, other)
        for how in hows if first else ():
            both = ((first, _HOW[how]), (second, _HOW[how]))
            found.append(_compare(analysis, f"{claim}, {how}", sides, both, sign))
    if analysis.metric == "loss":
        return found
    return found + _at_equal_loss(analysis, sign) + _spread_over_lr(analysis, places)


def sound_places(analysis: Analysis) -> list[Place]:
    """Settings and steps above 0 at which every prompt has a value."""
    return [
        (setting, cell.step)
        for setting, curve in analysis.curves.items()
        for cell in curve
        if cell.step > 0 and cell.value.n == cell.n_prompts
    ]


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

    values, clusters = table_of(analysis, places, pair_of)
    whole = _rank(values.mean(0)) if len(values) else math.nan
    return _estimate(whole, [_rank(means) for means in _drawn_means(values, clusters)], len(values))


def _rank(means: np.ndarray) -> float:
    rank = spearman(means[:, 0].tolist(), means[:, 1].tolist())
    return 0.0 if math.isnan(rank) else rank  # what does not vary tells nothing


def _claims(
    metric: str, places: Sequence[Place]
) -> list[tuple[str, str, tuple[str, str], tuple[Any, Any], tuple[str, ...]]]:
    """Claim, axis, names of the sides, their values on it, and what counts of each side."""

    def values(axis: str) -> list[float]:
        return sorted({getattr(setting, axis) for setting, _ in places} - {None})

    best, worst, mean = _HOW
    if metric == "loss":
        return [("AdamW lowers the loss of the prompts more than SGD of the same learning rate",
                 "optimizer", ("AdamW", "SGD"), ("adamw", "sgd"), (mean,))]  # fmt: skip
    claims = [
        ("SGD does better than AdamW of the same learning rate", "optimizer", ("SGD", "AdamW"),
         ("sgd", "adamw"), (best, mean)),
        ("Feed-forward weights alone do better than all", "scope", ("ffn", "all"), ("ffn", "all"),
         (best, mean)),
        ("Attention weights alone are safer than all", "scope", ("attention", "all"),
         ("attention", "all"), (worst, mean)),
    ]  # fmt: skip
    for clip in values("max_grad_norm")[:1]:
        claims.append(("Clipping spares drops", "max_grad_norm", (f"clip {clip:g}", "no clip"),
                       (clip, None), (worst, mean)))  # fmt: skip
    for axis, name in (("momentum", "Momentum"), ("weight_decay", "Weight decay")):
        least, *_, most = values(axis) * 2 or (0, 0)
        if most > least:
            claims.append(
                (f"{name} helps", axis, (f"{most:g}", f"{least:g}"), (most, least), (mean,))
            )
    return claims


def _unadapted(analysis: Analysis, places: Sequence[Place], sign: float) -> list[Finding]:
    """The original weights against those of all settings and steps."""
    scored = {setting for setting, curve in analysis.curves.items() if curve[0].step == 0}
    after = [place for place in places if place[0] in scored]
    # The same for every setting.
    before = [(setting, 0) for setting in dict.fromkeys(setting for setting, _ in after)]
    if not after:
        return []
    claims = (
        ("Adapting does worse than not adapting, in the mean", np.mean),
        ("Adapting does worse than not adapting, even at its best", np.max),
        ("Adapting does worse than not adapting, at its worst", np.min),
    )
    return [
        _compare(analysis, claim, ("not adapted", "adapted"),
                 ((before, np.mean), (after, statistic)), sign)
        for claim, statistic in claims
    ]  # fmt: skip


def _matched(
    places: Iterable[Place], axis: str, one: Hashable, other: Hashable
) -> tuple[list[Place], list[Place]]:
    """Places with either value of an axis that have a counterpart, equal in all else."""
    sides: tuple[dict[Hashable, list[Place]], ...] = ({}, {})
    for setting, step in places:
        for side, value in zip(sides, (one, other), strict=True):
            if getattr(setting, axis) == value:
                side.setdefault((all_else(setting, axis), step), []).append((setting, step))
    shared = [key for key in sides[0] if key in sides[1]]
    first, second = ([place for key in shared for place in side[key]] for side in sides)
    return first, second


def all_else(setting: Setting, *axes: str) -> Setting:
    """A setting without its values on some axes: equal for those that differ there only."""
    # AdamW has no momentum to be equal in.
    free = dict.fromkeys(axes) | ({"momentum": None} if "optimizer" in axes else {})
    return replace(setting, **free)


def _at_equal_loss(analysis: Analysis, sign: float) -> list[Finding]:
    """SGD where it has brought the prompts about as far as AdamW: the same learning rate does not.

    Each setting and step of AdamW has the one of SGD with the nearest mean loss, of any learning
    rate; those that have none within a factor of 1.5 are left out.
    """
    alike: dict[Setting, set[str]] = {}
    for setting in analysis.curves:
        alike.setdefault(all_else(setting, "optimizer", "lr"), set()).add(setting.optimizer)
    both = [s for s in analysis.curves if len(alike[all_else(s, "optimizer", "lr")]) > 1]
    same = analysis.shared(both)
    sound = set(sound_places(same))
    losses = {
        (setting, cell.step): cell.means["loss"]
        for setting in same.curves
        for cell in same.curves[setting]
        if (setting, cell.step) in sound and cell.means["loss"]
    }
    pairs = []
    for place, loss in losses.items():
        near = [
            (abs(math.log(losses[other] / loss)), n, other)
            for n, other in enumerate(losses)
            if place[0].optimizer == "adamw" and other[0].optimizer == "sgd"
            and all_else(other[0], "optimizer", "lr") == all_else(place[0], "optimizer", "lr")
        ]  # fmt: skip
        if near and min(near)[0] <= math.log(_EQUAL_LOSS):
            pairs.append((min(near)[2], place))
    if not pairs:
        return []
    first, second = zip(*pairs, strict=True)
    claim = "SGD does better than AdamW where the loss of the prompts is equal, in the mean"
    sides = ((first, np.mean), (second, np.mean))
    return [_compare(same, claim, ("SGD", "AdamW"), sides, sign)]


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
        groups.setdefault(all_else(setting, "lr"), []).append(n)
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
    values, clusters = table_of(
        analysis, [*first, *second], lambda line: (analysis.goodness_of(line),)
    )

    def numbers(means: np.ndarray) -> tuple[float, float]:
        return float(of_first(means[:n, 0])), float(of_second(means[n:, 0]))

    a, b = numbers(values.mean(0)) if len(values) else (math.nan, math.nan)
    draws = [x - y for x, y in map(numbers, _drawn_means(values, clusters))]
    difference = _estimate(a - b, draws, len(values))
    return Finding(claim, sides, (sign * a, sign * b), difference, (n, len(second)))


def table_of(
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
