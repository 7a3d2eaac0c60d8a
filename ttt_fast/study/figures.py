"""The figures of a study: curves by learning rate, one setting varied at a time, predictors."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ttt_fast.study.analysis import PREDICTORS, Analysis, Cell
from ttt_fast.study.grid import Setting
from ttt_fast.study.intervals import spearman

if TYPE_CHECKING:
    from ttt_fast.study.report import StudyReport

# Okabe and Ito's colours, which colour-blind people tell apart; markers for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
# Below this share of landed updates a point is drawn hollow: it shows rounding, not learning.
LANDED = 0.5
# More bands than this hide each other.
_MOST_BANDS = 3

_AXES = {
    "optimizer": "SGD against AdamW",
    "weight_decay": "Weight decay",
    "max_grad_norm": "Gradient clipping",
    "momentum": "Momentum",
    "scope": "Adapted parts",
}
_NAMES = {"max_grad_norm": "clip", "weight_decay": "decay"}


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
        label = "NLL a token" if metric == "nll" else f"right by {metric}, %"
        if len({setting.lr for setting in analysis.curves}) > 1:
            drawn.append(_by_lr(analysis, metric, label))
        drawn += [
            _by_axis(analysis, axis, metric, label)
            for axis in _AXES
            if _varies(analysis.curves, axis)
        ]
        if analysis.choices():
            drawn.append(_predictors(analysis, metric, label))
    first = next(iter(report.analyses.values()))
    drawn.insert(1 if len(drawn) > 1 else 0, _loss(first))
    return drawn


def _varies(settings: Iterable[Setting], axis: str) -> bool:
    # AdamW's momentum of 0 is none.
    own = [s for s in settings if axis != "momentum" or s.optimizer == "sgd"]
    return len({getattr(setting, axis) for setting in own}) > 1


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


def _by_lr(analysis: Analysis, metric: str, label: str) -> Drawn:
    def draw(axes: Any, curve: Sequence[Cell], look: dict[str, Any], name: str) -> None:
        _curve(axes, curve, metric, look, name, banded=not crowded)

    crowded = len({setting.lr for setting in analysis.curves}) > _MOST_BANDS
    shown = "Bars at the last step" if crowded else "Bands"
    png = _panels_by_lr(analysis, draw, label, _unadapted(analysis, metric))
    words = (
        "A panel for each optimizer and part, a line for each learning rate; other settings as in"
        f" the panel's title. {shown}: 95 % intervals over prompts. Dotted: not adapted." + _HOLLOW
    )
    return Drawn(f"{metric}_by_lr", f"{_sentence(metric)} against steps", words, png)


def _loss(analysis: Analysis) -> Drawn:
    def draw(axes: Any, curve: Sequence[Cell], look: dict[str, Any], name: str) -> None:
        points = [(c.step, c.means["loss"], c) for c in curve if c.means["loss"] is not None]
        _line(axes, points, look, name)

    png = _panels_by_lr(analysis, draw, "loss of the prompt", None)
    words = (
        "What is minimised. The mean over the prompts that did not diverge; a line ends where all"
        " did." + _HOLLOW
    )
    return Drawn("loss_by_lr", "Loss of the prompt against steps", words, png)


def _panels_by_lr(
    analysis: Analysis,
    draw: Callable[..., None],
    label: str,
    unadapted: float | None,
) -> bytes:
    panels: dict[tuple[str, str], list[Setting]] = {}
    for setting in _plain(analysis.curves):
        panels.setdefault((setting.scope, setting.optimizer), []).append(setting)
    n_columns = min(3, len(panels))
    figure, grid = _figure(math.ceil(len(panels) / n_columns), n_columns)
    for axes, ((scope, optimizer), settings) in zip(grid, panels.items(), strict=False):
        for i, setting in enumerate(sorted(settings, key=lambda s: s.lr)):
            curve = analysis.curves[setting]
            draw(axes, curve, _look(i), f"lr {setting.lr:g}{_landed(curve)}")
        axes.set_title(f"{optimizer}, {scope}\n{_others(settings[0], ())}", fontsize=9)
        _finish(axes, "steps", label, unadapted)
    return _png(figure, grid[len(panels) :])


# ---------------------------------------------------------------------------- one axis


def _by_axis(analysis: Analysis, axis: str, metric: str, label: str) -> Drawn:
    """Against steps at the largest learning rate, and at the last step against learning rates."""
    plain = list(_plain(analysis.curves))
    base = max(plain, key=lambda s: (s.optimizer == "sgd", s.lr))
    values = list(dict.fromkeys(getattr(setting, axis) for setting in analysis.curves))
    figure, (by_step, by_lr) = _figure(1, 2)
    shown = []
    for i, value in enumerate(values):
        name = f"{_NAMES.get(axis, axis)} {'none' if value is None else value}"
        alike = sorted(
            (s for s in analysis.curves if _same(s, replace(base, **{axis: value}), axis)),
            key=lambda s: s.lr,
        )
        if not alike:
            continue
        at_lr = next((s for s in alike if s.lr == base.lr), alike[-1])
        shown.append(at_lr)
        curve = analysis.curves[at_lr]
        _curve(by_step, curve, metric, _look(i), name + _landed(curve))
        ends = [(s.lr, analysis.curves[s][-1]) for s in alike]
        _curve(by_lr, [c for _, c in ends], metric, _look(i), name, [lr for lr, _ in ends])
    unadapted = _unadapted(analysis, metric)
    _finish(by_step, "steps", label, unadapted)
    by_step.set_title(f"lr {base.lr:g}; {_others(base, (axis,))}", fontsize=9)
    _finish(by_lr, "learning rate", label, unadapted)
    by_lr.set_title("at the last step", fontsize=9)
    by_lr.set_xscale("log")
    words = (
        f"{_AXES[axis]}, all else equal ({_others(base, (axis,))}). Bands: 95 % intervals over"
        " prompts. Dotted: not adapted." + _HOLLOW
    )
    return Drawn(f"{metric}_by_{axis}", f"{_AXES[axis]}: {metric}", words, _png(figure, []))


def _same(setting: Setting, other: Setting, axis: str) -> bool:
    """Whether two settings agree in all but lr; AdamW, which has no momentum, agrees with any."""
    if axis == "optimizer" and setting.optimizer != "sgd":
        other = replace(other, momentum=0.0)
    return replace(setting, lr=other.lr) == other


# ---------------------------------------------------------------------------- predictors


def _predictors(analysis: Analysis, metric: str, label: str) -> Drawn:
    names = [name for name in PREDICTORS if analysis.points(name)]
    figure, grid = _figure(1, len(names))
    for axes, name in zip(grid, names, strict=True):
        words, less = PREDICTORS[name]
        points = analysis.points(name)
        for i, optimizer in enumerate(sorted({p[0].optimizer for p in points}, reverse=True)):
            own = [p for p in points if p[0].optimizer == optimizer]
            axes.plot([p[2] for p in own], [_shown(p[3], metric) for p in own],
                      linestyle="", label=optimizer, alpha=0.6, **_mark(i))  # fmt: skip
        sign = -1 if less else 1
        good = [-p[3] if analysis.less_is_better else p[3] for p in points]
        rank = spearman([sign * p[2] for p in points], good)
        told = "" if math.isnan(rank) else f"\nrank correlation of less with better {rank:+.2f}"
        axes.set_title(f"{words}{told}", fontsize=9)
        if min(p[2] for p in points) > 0 and max(p[2] for p in points) > 30 * min(
            p[2] for p in points
        ):
            axes.set_xscale("log")
        _finish(axes, words, label, _unadapted(analysis, metric))
    words = (
        "Each point is a setting after some steps (not step 0), the mean over prompts; those at"
        " which a prompt diverged are left out. A predictor that could choose without labels would"
        " show points that rise to the left."
        if not analysis.less_is_better
        else "Each point is a setting after some steps (not step 0), the mean over prompts; those"
        " at which a prompt diverged are left out. A predictor that could choose without labels"
        " would show points that fall to the left."
    )
    return Drawn(f"{metric}_predictors", f"What tells without labels: {metric}", words,
                 _png(figure, []))  # fmt: skip


# ---------------------------------------------------------------------------- lines and panels

_HOLLOW = (
    f" Hollow points: less than {LANDED:.0%} of the updates reached the weights (update_landed, in"
    " the legend), so they show rounding."
)


def _plain(settings: Iterable[Setting]) -> list[Setting]:
    """Settings that are at the first value of every axis that the figure does not vary."""
    settings = list(settings)
    found = []
    for optimizer in dict.fromkeys(s.optimizer for s in settings):
        own = [s for s in settings if s.optimizer == optimizer]
        first = min(own, key=lambda s: (s.weight_decay, s.momentum, s.max_grad_norm is not None))
        found += [s for s in own if replace(s, lr=first.lr, scope=first.scope) == first]
    return found


def _others(setting: Setting, left_out: Sequence[str]) -> str:
    """The settings that a panel holds fixed, in words."""
    words = []
    for field in fields(setting):
        if field.name in ("lr", *left_out, *(("scope", "optimizer") if not left_out else ())):
            continue
        value = getattr(setting, field.name)
        shown = "none" if value is None else value if isinstance(value, str) else f"{value:g}"
        words.append(f"{_NAMES.get(field.name, field.name)} {shown}")
    return ", ".join(words)


def _figure(n_rows: int, n_columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * n_columns, 3.7 * n_rows), layout="constrained")
    return figure, list(figure.subplots(n_rows, n_columns, squeeze=False).flat)


def _look(i: int) -> dict[str, Any]:
    return _mark(i) | {"linestyle": ("-", "--", "-.", ":")[i // len(_COLOURS) % 4]}


def _mark(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}


def _shown(value: float, metric: str) -> float:
    return value if metric == "nll" else 100 * value


def _curve(
    axes: Any,
    curve: Sequence[Cell],
    metric: str,
    look: dict[str, Any],
    name: str,
    places: Sequence[float] | None = None,
    banded: bool = True,
) -> None:
    """A line with its intervals; by steps unless other places are given."""
    places = [cell.step for cell in curve] if places is None else places
    points = [
        (place, _shown(cell.value.mean, metric), cell)
        for place, cell in zip(places, curve, strict=True)
        if not math.isnan(cell.value.mean)
    ]
    _line(axes, points, look, name)
    band = [
        (place, _shown(cell.value.low, metric), _shown(cell.value.high, metric))
        for place, _, cell in points
        if not math.isnan(cell.value.low)
    ]
    if not band:
        return
    if banded:
        axes.fill_between(*zip(*band, strict=True), color=look["color"], alpha=0.10, linewidth=0)
    else:
        place, low, high = band[-1]
        # Side by side, behind the last step.
        _beside(axes.vlines(place, low, high, color=look["color"], linewidth=1.2), axes)


def _beside(bar: Any, axes: Any) -> None:
    from matplotlib.transforms import ScaledTranslation

    points = 4 + 4 * len(axes.collections)
    to_inches = axes.figure.dpi_scale_trans
    bar.set_transform(axes.transData + ScaledTranslation(points / 72, 0, to_inches))
    axes.margins(x=0.14)


def _line(
    axes: Any, points: Sequence[tuple[float, float, Cell]], look: dict[str, Any], name: str
) -> None:
    plain = {key: value for key, value in look.items() if key != "marker"}
    axes.plot([p[0] for p in points], [p[1] for p in points], linewidth=1.4, **plain)
    for fill, landed in (("full", True), ("none", False)):
        own = [p for p in points if (p[2].landed[1] >= LANDED) == landed]
        axes.plot([p[0] for p in own], [p[1] for p in own], linestyle="", fillstyle=fill,
                  color=look["color"], marker=look["marker"], markersize=5)  # fmt: skip
    # For the legend, a line with its marker.
    axes.plot([], [], label=name, markersize=5, **look)


def _landed(curve: Sequence[Cell]) -> str:
    return f" (landed {curve[-1].landed[1]:.2f})"


def _unadapted(analysis: Analysis, metric: str) -> float | None:
    return None if analysis.unadapted is None else _shown(analysis.unadapted.mean, metric)


def _finish(axes: Any, x_label: str, y_label: str, unadapted: float | None) -> None:
    if unadapted is not None:
        axes.axhline(unadapted, color="0.3", linewidth=1, linestyle=(0, (1, 3)), zorder=0)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.grid(True, color="0.92", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False)


def _sentence(text: str) -> str:
    return text.upper() if text == "nll" else text[0].upper() + text[1:]


def _png(figure: Any, unused: Sequence[Any]) -> bytes:
    for axes in unused:
        axes.set_visible(False)
    file = io.BytesIO()
    # Without matplotlib's version in it the same results give the same bytes.
    figure.savefig(file, dpi=130, format="png", metadata={"Software": None})
    return file.getvalue()
