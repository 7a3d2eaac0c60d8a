"""How much each choice matters: learning rate, steps, clip, parts, ..., and how much chance makes.

The largest of several means is above the smallest even where nothing differs, so a spread says
little alone. If a choice did not matter, a prompt's results under its values could as well be
exchanged: 1000 times they are, prompt by prompt (whole clusters of prompts where there are
clusters), and the spread is counted again (a permutation test, exact but for the number of draws).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttt_fast.study.analysis import Analysis
from ttt_fast.study.findings import Place, all_else, sound_places, table_of

_DRAWS = 1000
AXES = ("lr", "steps", "optimizer", "weight_decay", "momentum", "max_grad_norm", "scope")


@dataclass(frozen=True)
class Sensitivity:
    """What one choice does to a metric.

    Attributes:
        axis: of the grid.
        means: value on the axis -> mean of the metric, over the groups.
        spread: largest minus smallest value in a group, the mean over groups.
        by_chance: what the spread is below in 95 % of the draws, if the axis does not matter.
        p: share of the draws that have such a spread.
        n_groups: settings and steps that are equal in all else.
        n_prompts: prompts that have all of it.
    """

    axis: str
    means: Mapping[Any, float]
    spread: float
    by_chance: float
    p: float
    n_groups: int
    n_prompts: int


def sensitivities(analysis: Analysis) -> list[Sensitivity]:
    """Of every axis on which there are settings that differ in nothing else."""
    places = sound_places(analysis)
    found = []
    for axis in AXES:
        values, groups = _groups(places, axis)
        if groups:
            found.append(_sensitivity(analysis, axis, values, groups))
    return [each for each in found if each.n_prompts]


def _groups(places: Sequence[Place], axis: str) -> tuple[list[Any], list[list[Place]]]:
    """Values on an axis, and places that have each of them once and are equal in all else.

    The values are those that the most groups have, so that all groups compare the same.
    """
    together: dict[Hashable, dict[Any, Place]] = {}
    for setting, step in places:
        key = setting if axis == "steps" else (all_else(setting, axis), step)
        value = step if axis == "steps" else getattr(setting, axis)
        together.setdefault(key, {}).setdefault(value, (setting, step))
    counts = Counter(frozenset(group) for group in together.values() if len(group) > 1)
    if not counts:
        return [], []
    most = max(counts, key=lambda values: (counts[values], len(values)))
    values = sorted(most, key=lambda value: (value is not None, value))
    whole = [group for group in together.values() if most <= set(group)]
    return values, [[group[value] for value in values] for group in whole]


def _sensitivity(
    analysis: Analysis, axis: str, values: Sequence[Any], groups: Sequence[Sequence[Place]]
) -> Sensitivity:
    places = [place for group in groups for place in group]
    table, clusters = table_of(analysis, places, lambda line: (analysis.value_of(line),))
    n = len(table)
    if not n:
        return Sensitivity(axis, {}, np.nan, np.nan, np.nan, len(groups), 0)
    table = table.reshape(n, len(groups), len(values))
    numbers = {cluster: n for n, cluster in enumerate(dict.fromkeys(clusters))}
    own = [numbers[cluster] for cluster in clusters]
    draw = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS):
        order = draw.random((len(numbers), len(values))).argsort(1)[own]
        drawn.append(_spread(np.take_along_axis(table, order[:, None, :], axis=2)))
    spread = _spread(table)
    # The results as they are count as a draw; what rounding makes differ is equal.
    p = (1 + np.sum(np.array(drawn) >= spread - 1e-12)) / (_DRAWS + 1)
    means = dict(zip(values, table.mean((0, 1)).tolist(), strict=True))
    by_chance = float(np.percentile(drawn, 95))
    return Sensitivity(axis, means, spread, by_chance, float(p), len(groups), n)


def _spread(table: np.ndarray) -> float:
    """Largest minus smallest mean over prompts, the mean over groups."""
    return float(np.ptp(table.mean(0), axis=1).mean())
