"""From results to numbers: curves with intervals, robustness, and predictors without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ttt_fast.study.grid import Setting
from ttt_fast.study.intervals import Estimate, mean_estimate, share_estimate, spearman
from ttt_fast.study.results import key_of

# What can be looked at without labels: name -> (words, whether less of it is meant to be better).
PREDICTORS: dict[str, tuple[str, bool]] = {
    "loss": ("loss of the prompt", True),
    "grad_norm": ("gradient norm", True),
    "delta_norm": ("norm of the change", True),
}
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One setting after some steps, over all prompts.

    Attributes:
        step: number of steps.
        value: of the metric. What diverged is wrong in a share, and left out of a "nll".
        change: from the original weights, prompt by prompt: value − value at step 0.
        n_prompts: prompts that there is a result of.
        n_diverged: those whose trajectory is not finite here.
        means: predictor -> mean over the prompts that did not diverge; None where nothing is.
        landed: the least and the mean update_landed of the prompts.
    """

    step: int
    value: Estimate
    change: Estimate
    n_prompts: int
    n_diverged: int
    means: Mapping[str, float | None]
    landed: tuple[float, float]


@dataclass(frozen=True)
class Robustness:
    """What a setting does over all its steps but step 0.

    Attributes:
        setting: the setting.
        best: the best value, and at which step.
        worst: likewise.
        area: mean of value − value at step 0 along the steps (trapezoids).
        lr_spread: largest minus smallest final value of the settings that differ in lr only.
        n_diverged: prompts that diverged by the last step.
    """

    setting: Setting
    best: tuple[float, int]
    worst: tuple[float, int]
    area: float
    lr_spread: float
    n_diverged: int


@dataclass(frozen=True)
class Choice:
    """The setting and step that a predictor alone would have chosen, and what came of it.

    Attributes:
        predictor: key of PREDICTORS.
        correlation: Spearman's, between the predictor and how good the metric is.
        n_points: settings and steps that it is over.
        setting: the one with the least of it.
        cell: what came of it, at the step with the least of it.
    """

    predictor: str
    correlation: float
    n_points: int
    setting: Setting
    cell: Cell


class Analysis:
    """Curves of one metric.

    Args:
        lines: results.
        metric: "likelihood", "generation" or "nll"; "loss" is that of the prompts.
        group: only prompts of this group; default all.
    """

    def __init__(self, lines: Iterable[Line], metric: str, group: str | None = None) -> None:
        self.metric = metric
        self.less_is_better = metric in ("nll", "loss")
        by_cell: dict[Setting, dict[int, dict[str, Line]]] = {}
        for line in lines:
            if group is None or line.get("group") == group:
                prompt, setting, step = key_of(line)
                by_cell.setdefault(setting, {}).setdefault(step, {})[prompt] = line
        self._by_cell = by_cell
        self.curves: dict[Setting, list[Cell]] = {
            setting: [self._cell(by_step, step) for step in sorted(by_step)]
            for setting, by_step in by_cell.items()
        }

    def shared(self, settings: Iterable[Setting] | None = None) -> Analysis:
        """The curves of some settings on the prompts that all of them have, at all their steps.

        Means over other prompts cannot be compared: more of one setting's may be easy ones.
        """
        chosen = list(self._by_cell if settings is None else settings)
        cells = [cell for setting in chosen for cell in self._by_cell[setting].values()]
        common = set.intersection(*map(set, cells)) if cells else set()
        if len(chosen) == len(self._by_cell) and all(len(cell) == len(common) for cell in cells):
            return self
        lines = (line for cell in cells for prompt, line in cell.items() if prompt in common)
        return Analysis(lines, self.metric)

    @property
    def n_prompts(self) -> int:
        """Prompts of the setting and step with most of them."""
        return max((cell.n_prompts for curve in self.curves.values() for cell in curve), default=0)

    def lines_of(self, setting: Setting, step: int) -> Mapping[str, Line]:
        """The results of a setting after some steps, by prompt."""
        return self._by_cell[setting][step]

    def value_of(self, line: Line) -> float | None:
        """The metric of a result; None where it is not finite."""
        if self.less_is_better:
            return line[self.metric]
        return float(line["correct"][self.metric])

    def goodness_of(self, line: Line) -> float | None:
        """The metric of a result, turned so that more is better; None where it is not finite."""
        value = self.value_of(line)
        return None if value is None else self._goodness(value)

    def _cell(self, by_step: Mapping[int, Mapping[str, Line]], step: int) -> Cell:
        lines = by_step[step]
        measured = {p: v for p, v in ((p, self.value_of(x)) for p, x in lines.items())
                    if v is not None}  # fmt: skip
        before = {p: self.value_of(x) for p, x in by_step.get(0, {}).items()}
        changes = {p: v - before[p] for p, v in measured.items() if before.get(p) is not None}
        sound = [line for line in lines.values() if line["diverged_at"] is None]
        landed = [line["update_landed"] for line in lines.values()]
        return Cell(
            step,
            self._estimate(measured, lines),
            mean_estimate(list(changes.values()), _clusters(lines, changes)),
            len(lines),
            len(lines) - len(sound),
            {name: _mean(line[name] for line in sound) for name in PREDICTORS},
            (min(landed), math.fsum(landed) / len(landed)),
        )

    def _estimate(self, measured: Mapping[str, float], lines: Mapping[str, Line]) -> Estimate:
        clusters = _clusters(lines, measured)
        if self.less_is_better:
            return mean_estimate(list(measured.values()), clusters)
        return share_estimate([v == 1.0 for v in measured.values()], clusters)

    @property
    def unadapted(self) -> Estimate | None:
        """The original weights, of the setting with most prompts; None if step 0 was left out."""
        cells = [curve[0].value for curve in self.curves.values() if curve[0].step == 0]
        return max(cells, key=lambda value: value.n, default=None)

    # ------------------------------------------------------------------ robustness

    def robustness(self) -> list[Robustness]:
        """Of every setting that has a step above 0."""
        last = {
            setting: curve[-1].value.mean
            for setting, curve in self.curves.items()
            if curve[-1].step > 0
        }
        rows = []
        for setting, curve in self.curves.items():
            cells = [c for c in curve if c.step > 0 and not math.isnan(c.value.mean)]
            if not cells:
                continue
            ordered = sorted(cells, key=lambda c: self._goodness(c.value.mean))
            worst, best = ordered[0], ordered[-1]
            alike = [
                value
                for other, value in last.items()
                if replace(other, lr=setting.lr) == setting and not math.isnan(value)
            ]
            rows.append(Robustness(
                setting,
                (best.value.mean, best.step),
                (worst.value.mean, worst.step),
                _area(curve),
                max(alike) - min(alike) if len(alike) > 1 else math.nan,
                curve[-1].n_diverged,
            ))  # fmt: skip
        return rows

    # ------------------------------------------------------------------ without labels

    def choices(self) -> list[Choice]:
        """What each predictor would have chosen among all settings and steps above 0."""
        found = []
        for name, (_, less) in PREDICTORS.items():
            points = self.points(name)
            if not points:
                continue
            sign = -1.0 if less else 1.0
            correlation = spearman(
                [sign * x for _, _, x, _ in points],
                [self._goodness(value) for *_, value in points],
            )
            setting, step, *_ = max(points, key=lambda point: sign * point[2])
            cell = next(cell for cell in self.curves[setting] if cell.step == step)
            found.append(Choice(name, correlation, len(points), setting, cell))
        return found

    def chosen_by_prompt(self, predictor: str) -> tuple[Estimate, Estimate]:
        """The metric, and its change, if each prompt took the setting and step with the least.

        Of a predictor of its own, that is: what someone with this one prompt could have done.
        """
        least: dict[str, Line] = {}
        before: dict[str, float | None] = {}
        for by_step in self._by_cell.values():
            for step, lines in by_step.items():
                for prompt, line in lines.items():
                    if step == 0:
                        before[prompt] = self.value_of(line)
                    elif line["diverged_at"] is None and line[predictor] is not None:
                        if prompt not in least or line[predictor] < least[prompt][predictor]:
                            least[prompt] = line
        values = {p: v for p, v in ((p, self.value_of(x)) for p, x in least.items())
                  if v is not None}  # fmt: skip
        changes = {p: v - before[p] for p, v in values.items() if before.get(p) is not None}
        change = mean_estimate(list(changes.values()), _clusters(least, changes))
        return self._estimate(values, least), change

    def points(self, predictor: str) -> list[tuple[Setting, int, float, float]]:
        """Setting, step, mean of the predictor and value of the metric, for all steps above 0.

        Where a prompt diverged the means are over other prompts than the value: left out.
        """
        return [
            (setting, cell.step, cell.means[predictor], cell.value.mean)
            for setting, curve in self.curves.items()
            for cell in curve
            if cell.step > 0
            and cell.n_diverged == 0
            and cell.means[predictor] is not None
            and not math.isnan(cell.value.mean)
        ]

    def best(self) -> tuple[Setting, Cell] | None:
        """The best setting and step in hindsight; None if there is none above step 0."""
        cells = [
            (setting, cell)
            for setting, curve in self.curves.items()
            for cell in curve
            if cell.step > 0 and not math.isnan(cell.value.mean)
        ]
        return max(cells, key=lambda each: self._goodness(each[1].value.mean), default=None)

    def _goodness(self, value: float) -> float:
        return -value if self.less_is_better else value


def groups_of(lines: Iterable[Line]) -> list[str]:
    """Groups that there are."""
    return sorted({line["group"] for line in lines if line.get("group") is not None})


def _clusters(lines: Mapping[str, Line], prompts: Iterable[str]) -> list[str] | None:
    clusters = [lines[prompt].get("cluster") for prompt in prompts]
    return None if None in clusters else clusters


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def _area(curve: Sequence[Cell]) -> float:
    """Mean change along the steps; NaN without two points to stand between."""
    points = [(c.step, c.change.mean) for c in curve if not math.isnan(c.change.mean)]
    if len(points) < 2:
        return math.nan
    area = sum(
        (right[0] - left[0]) * (left[1] + right[1]) / 2
        for left, right in zip(points, points[1:], strict=False)
    )
    return area / (points[-1][0] - points[0][0])
