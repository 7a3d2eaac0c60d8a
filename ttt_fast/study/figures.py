"""The figures of a study: by learning rate, one setting varied at a time, predictors, claims.

Lines that are compared in a panel are over the same prompts, those that all of them have; the panel
says how many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ttt_fast.study.analysis import PREDICTORS, Analysis
from ttt_fast.study.drawing import (
    HOLLOW,
    draw_line,
    finish,
    mark,
    new_figure,
    png_of,
    short,
    shown,
)
from ttt_fast.study.findings import OPEN, Finding
from ttt_fast.study.grid import Setting

if TYPE_CHECKING:
    from ttt_fast.study.report import StudyReport

_AXES = {
    "optimizer": "SGD against AdamW",
    "weight_decay": "Weight decay",
    "max_grad_norm": "Gradient clipping",
    "momentum": "Momentum",
    "scope": "Adapted parts",
}
_NAMES = {"max_grad_norm": "clip", "weight_decay": "decay"}
_WORDS = {"sgd": "SGD", "adamw": "AdamW", "all": "all weights"}
# More panels are too small to read: then only the plainest settings have one.
_MOST_PANELS = 9
_INTERVALS = (
    " Vertical lines: 95 % intervals over prompts, beside each other where points coincide. Dotted:"
    " not adapted."
)


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        name: of its file, without the ending.
        title: over it.
        words: how to read it.
        png: its bytes.
    """

    name: str
    title: str
    words: str
    png: bytes


def draw_all(report: StudyReport) -> list[Drawn]:
    """All figures that the settings of a report give something to.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    require_matplotlib()
    drawn = []
    for metric, analysis in report.analyses.items():
        drawn.append(_by_lr(analysis))
        drawn += [_by_axis(analysis, axis) for axis in _AXES if _panels_of(analysis, axis)]
        if report.compared[metric].choices():
            drawn.append(_predictors(report.compared[metric]))
        told = [f for f in report.findings[metric] if not math.isnan(f.difference.low)]
        if told:
            drawn.append(_findings(told, metric))
    drawn.append(_by_lr(report.loss))
    if _panels_of(report.loss, "optimizer"):
        drawn.append(_by_axis(report.loss, "optimizer"))
    return drawn


def require_matplotlib() -> None:
    """Before hours of work, not after.

    Raises:
        ModuleNotFoundError: it is missing; says how to get it.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "the figures of a study need matplotlib: pip install 'ttt-fast[demo]'"
        )


# ---------------------------------------------------------------------------- by learning rate


def _by_lr(analysis: Analysis) -> Drawn:
    panels: dict[Setting, list[Setting]] = {}
    for setting in sorted(analysis.curves, key=_panel_order):
        panels.setdefault(replace(setting, lr=0.0), []).append(setting)
    if len(panels) > _MOST_PANELS:
        plain = set(_plain(analysis.curves))
        panels = {key: own for key, own in panels.items() if plain & set(own)}
    n_columns = min(3, len(panels))
    figure, grid = new_figure(math.ceil(len(panels) / n_columns), n_columns)
    for axes, settings in zip(grid, panels.values(), strict=False):
        same = analysis.shared(settings)
        for i, setting in enumerate(settings):
            points = [(cell.step, cell) for cell in same.curves.get(setting, ())]
            name = f"lr {short(setting.lr)}"
            draw_line(axes, points, analysis.metric, name, i, len(settings))
        first = settings[0]
        title = f"{_words(first.optimizer)}, {_words(first.scope)}, n = {same.n_prompts}"
        finish(axes, f"{title}\n{_others(first, ('optimizer', 'scope'))}", "steps", same)
    words = (
        "A panel for each optimizer, part and further setting, n prompts; a line for each learning"
        f" rate.{_INTERVALS}{HOLLOW}"
    )
    if analysis.metric == "loss":
        words = f"What is minimised; what diverged is left out. {words}"
    title = f"{_sentence(analysis.metric)} against steps"
    return Drawn(f"{analysis.metric}_by_lr", title, words, png_of(figure, grid[len(panels) :]))


def _panel_order(setting: Setting) -> tuple[Any, ...]:
    """Parts beside each other, all else below."""
    clip = setting.max_grad_norm
    return (setting.optimizer != "sgd", setting.weight_decay, setting.momentum, clip is not None,
            clip or 0.0, setting.scope, setting.lr)  # fmt: skip


def _plain(settings: Iterable[Setting]) -> list[Setting]:
    """Settings that are at the first value of every axis but lr and scope."""
    settings = list(settings)
    found = []
    for optimizer in dict.fromkeys(s.optimizer for s in settings):
        own = [s for s in settings if s.optimizer == optimizer]
        first = min(own, key=lambda s: (s.weight_decay, s.momentum, s.max_grad_norm is not None))
        found += [s for s in own if replace(s, lr=first.lr, scope=first.scope) == first]
    return found


# ---------------------------------------------------------------------------- one axis


def _by_axis(analysis: Analysis, axis: str) -> Drawn:
    """A row for each part: against steps at a learning rate, and against the learning rates."""
    rows = _panels_of(analysis, axis)
    figure, grid = new_figure(len(rows), 2)
    for n, by_value in enumerate(rows):
        by_step, by_lr = grid[2 * n : 2 * n + 2]
        same = analysis.shared([s for own in by_value.values() for s in own.values()])
        lr = max(set.intersection(*map(set, by_value.values())))
        for i, (value, own) in enumerate(by_value.items()):
            name = _value_words(axis, value)
            curves = {
                each: same.curves[own[each]] for each in sorted(own) if own[each] in same.curves
            }
            steps = [(cell.step, cell) for cell in curves.get(lr, ())]
            ends = [(each, curve[-1]) for each, curve in curves.items()]
            for axes, points in ((by_step, steps), (by_lr, ends)):
                draw_line(axes, points, analysis.metric, name, i, len(by_value))
        fixed = _others(next(iter(by_value.values()))[lr], (axis,))
        title = f"lr {short(lr)}, n = {same.n_prompts}\n{fixed}"
        finish(by_step, title, "steps", same)
        finish(by_lr, f"at the last step, n = {same.n_prompts}\n{fixed}", "learning rate", same)
        by_lr.set_xscale("log")
    words = (
        f"{_AXES[axis]}, all else equal: on the left at the largest learning rate that all have, on"
        f" the right at the last step; n prompts.{_INTERVALS}{HOLLOW}"
    )
    title = f"{_AXES[axis]}: {analysis.metric}"
    return Drawn(f"{analysis.metric}_by_{axis}", title, words, png_of(figure, []))


def _panels_of(analysis: Analysis, axis: str) -> list[dict[Any, dict[float, Setting]]]:
    """For each part (each clip, where the part is what varies): value -> lr -> setting.

    Of one optimizer, unless that is what varies, and plain in all else. Values that have no
    learning rate in common are left out, and so are panels with a single value.
    """
    facet = "max_grad_norm" if axis == "scope" else "scope"
    free: dict[str, Any] = {"lr": 0.0, "scope": "", axis: None, facet: None}
    settings = sorted(analysis.curves, key=_panel_order)
    panels: dict[Any, dict[Any, dict[float, Setting]]] = {}
    for setting in settings:
        alike = [s for s in settings if s.optimizer == setting.optimizer]
        plain = min(alike, key=lambda s: (s.weight_decay, s.momentum, s.max_grad_norm is not None))
        same_optimizer = axis == "optimizer" or setting.optimizer == settings[0].optimizer
        if same_optimizer and replace(setting, **free) == replace(plain, **free):
            by_value = panels.setdefault(getattr(setting, facet), {})
            by_value.setdefault(getattr(setting, axis), {})[setting.lr] = setting
    found = []
    for by_value in panels.values():
        common: set[float] = set(next(iter(by_value.values())))
        kept = {}
        for value, own in by_value.items():
            if common & set(own):
                common &= set(own)
                kept[value] = own
        if len(kept) > 1:
            found.append(kept)
    return found


# ---------------------------------------------------------------------------- predictors


def _predictors(analysis: Analysis) -> Drawn:
    metric = analysis.metric
    names = [name for name in PREDICTORS if analysis.points(name)]
    figure, grid = new_figure(1, len(names))
    for axes, name in zip(grid, names, strict=True):
        words = PREDICTORS[name][0]
        points = analysis.points(name)
        kinds = sorted({(s.optimizer != "sgd", s.optimizer, s.scope) for s, *_ in points})
        for i, (_, *kind) in enumerate(kinds):
            own = [p for p in points if [p[0].optimizer, p[0].scope] == kind]
            axes.plot([p[2] for p in own], [shown(p[3], metric) for p in own], linestyle="",
                      label=", ".join(map(_words, kind)), alpha=0.7, markersize=5,
                      **mark(i))  # fmt: skip
        rank = next(c.correlation for c in analysis.choices() if c.predictor == name)
        told = "" if math.isnan(rank) else f"\nrank correlation, less with better: {rank:+.2f}"
        least, most = (end(p[2] for p in points) for end in (min, max))
        if least > 0 and most > 30 * least:
            axes.set_xscale("log")
        finish(axes, f"{words}, n = {analysis.n_prompts}{told}", words, analysis)
    way = "fall" if analysis.less_is_better else "rise"
    words = (
        "Each point is a setting after some steps (not step 0), the mean over n prompts; those at"
        " which a prompt diverged are left out. A predictor that could choose without labels would"
        f" show points that {way} to the left. Dotted: not adapted."
    )
    return Drawn(f"{metric}_predictors", f"What tells without labels: {metric}", words,
                 png_of(figure))  # fmt: skip


# ---------------------------------------------------------------------------- claims


def _findings(findings: Sequence[Finding], metric: str) -> Drawn:
    figure, (axes,) = new_figure(1, 1, height=0.9 + 0.36 * len(findings))
    figure.set_figwidth(9.5)
    for n, finding in enumerate(findings):
        difference = finding.difference
        mean, low, high = (shown(x, metric) for x in
                           (difference.mean, difference.low, difference.high))  # fmt: skip
        open_ = finding.verdict == OPEN
        look = {"color": "0.45"} if open_ else {"color": mark(0 if low > 0 else 1)["color"]}
        axes.plot([low, high], [n, n], linewidth=1.6, **look)
        axes.plot([mean], [n], marker="osD"[0 if open_ else 1 if low > 0 else 2], markersize=6,
                  fillstyle="none" if open_ else "full", linestyle="", **look)  # fmt: skip
        axes.annotate(f"n = {difference.n}", (1.01, n), xycoords=("axes fraction", "data"),
                      fontsize=7, va="center")  # fmt: skip
    axes.axvline(0, color="0.3", linewidth=1, linestyle=(0, (1, 3)), zorder=0)
    axes.set_yticks(range(len(findings)), [finding.claim for finding in findings], fontsize=8)
    axes.invert_yaxis()
    unit = "" if metric in ("nll", "loss") else ", percentage points"
    axes.set_xlabel(f"better by{unit}", fontsize=9)
    axes.grid(True, axis="x", color="0.9", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8)
    words = (
        "How far the first side of each claim is better than the second, with the 95 % interval"
        " when prompts are drawn again. Square: the interval is above 0, the claim holds; diamond:"
        " the opposite; hollow: it cannot be told. n prompts."
    )
    return Drawn(f"{metric}_findings", f"What others found: {metric}", words, png_of(figure))


# ---------------------------------------------------------------------------- words


def _others(setting: Setting, left_out: Sequence[str]) -> str:
    """The settings that a panel holds fixed, in words."""
    held = [field.name for field in fields(setting) if field.name not in ("lr", *left_out)]
    if setting.optimizer != "sgd":
        held.remove("momentum")
    return ", ".join(_value_words(name, getattr(setting, name)) for name in held)


def _value_words(axis: str, value: Any) -> str:
    if isinstance(value, str):
        return _words(value)
    return f"{_NAMES.get(axis, axis)} {value:g}" if value is not None else f"no {_NAMES[axis]}"


def _words(name: str) -> str:
    return _WORDS.get(name, name)


def _sentence(text: str) -> str:
    return text.upper() if text == "nll" else text[0].upper() + text[1:]
