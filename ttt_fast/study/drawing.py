"""How a study's figures look: lines beside each other with their intervals, panels, colours."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ttt_fast.study.analysis import Analysis, Cell

# Okabe and Ito's colours, which colour-blind people tell apart; markers for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
# Below this share of landed updates a point is drawn hollow: it shows rounding, not learning.
LANDED = 0.5
HOLLOW = (
    f" Hollow points: less than {LANDED:.0%} of the updates reached the weights (update_landed, in"
    " the legend), so they show rounding."
)
# With more lines than this, intervals at every point hide each other: only the last ones are drawn.
_MOST_INTERVALS = 3


def new_figure(n_rows: int, n_columns: int, height: float = 3.5) -> tuple[Any, list[Any]]:
    """A figure and its panels, row by row; they share the vertical axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * n_columns, height * n_rows), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    return figure, list(figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).flat)


def png_of(figure: Any, unused: Iterable[Any] = ()) -> bytes:
    """The figure as PNG, without the panels that nothing was drawn into."""
    for axes in unused:
        axes.set_visible(False)
    file = io.BytesIO()
    # Without matplotlib's version in it the same results give the same bytes.
    figure.savefig(file, dpi=140, format="png", metadata={"Software": None})
    return file.getvalue()


def mark(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th thing in a panel."""
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}


def shown(value: float, metric: str) -> float:
    """Shares in percent."""
    return value if metric in ("nll", "loss") else 100 * value


def label_of(metric: str) -> str:
    """What stands at the vertical axis."""
    return {"nll": "NLL a token", "loss": "loss of the prompt"}.get(
        metric, f"right by {metric}, % of prompts"
    )


def short(value: float) -> str:
    """A learning rate: 5e-5."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def draw_line(
    axes: Any, points: Sequence[tuple[float, Cell]], metric: str, name: str, i: int, n: int
) -> None:
    """The i-th of n lines of a panel, with its intervals.

    Points of different lines often are equal, so each line is a little to the side of the others.

    Args:
        axes: the panel.
        points: place on the horizontal axis, and what was measured there.
        metric: of the cells.
        name: in the legend, where the share of landed updates is added.
        i: number of the line.
        n: how many there are.
    """
    look = mark(i) | {"linestyle": ("-", "--", "-.", ":")[i // len(_COLOURS) % 4]}
    points = [(place, cell) for place, cell in points if not math.isnan(cell.value.mean)]
    if not points:
        return
    plain = {key: value for key, value in look.items() if key != "marker"}
    places = [place for place, _ in points]
    values = [shown(cell.value.mean, metric) for _, cell in points]
    drawn = axes.plot(places, values, linewidth=1.3, **plain)
    for fill, landed in (("full", True), ("none", False)):
        own = [k for k, (_, c) in enumerate(points) if (c.landed[1] >= LANDED) == landed]
        drawn += axes.plot([places[k] for k in own], [values[k] for k in own], linestyle="",
                           fillstyle=fill, color=look["color"], marker=look["marker"],
                           markersize=5)  # fmt: skip
    ends = [
        (place, shown(cell.value.low, metric), shown(cell.value.high, metric))
        for place, cell in points
        if not math.isnan(cell.value.low)
    ]
    if n > _MOST_INTERVALS:
        ends = ends[-1:]
    if ends:
        drawn.append(axes.vlines(*zip(*ends, strict=True), color=look["color"], linewidth=1.0,
                                 alpha=0.75))  # fmt: skip
    _aside(axes, drawn, (i - (n - 1) / 2) * (5 if n <= _MOST_INTERVALS else 3))
    landed = points[-1][1].landed[1]
    # For the legend, a line with its marker.
    axes.plot([], [], label=f"{name}, landed {landed:.2f}", markersize=5, **look)


def _aside(axes: Any, drawn: Sequence[Any], points: float) -> None:
    from matplotlib.transforms import ScaledTranslation

    # After they were drawn, so that the axis is scaled to where they are without it.
    aside = ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
    for artist in drawn:
        artist.set_transform(axes.transData + aside)


def finish(axes: Any, title: str, x_label: str, analysis: Analysis) -> None:
    """What stands around a panel; a dotted line at the value of the original weights."""
    if analysis.unadapted is not None:
        level = shown(analysis.unadapted.mean, analysis.metric)
        axes.axhline(level, color="0.3", linewidth=1, linestyle=(0, (1, 3)), zorder=0)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_label, fontsize=9)
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel(label_of(analysis.metric), fontsize=9)
    steps = sorted({cell.step for curve in analysis.curves.values() for cell in curve})
    if x_label == "steps" and len(steps) <= 8:
        axes.set_xticks(steps)
    axes.grid(True, axis="y", color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    names = axes.get_legend_handles_labels()[1]
    if names:
        # Below the panel, where there is nothing to hide.
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16),
                    ncols=2 if max(map(len, names)) > 21 else 3, columnspacing=1.0,
                    handlelength=1.8)  # fmt: skip
