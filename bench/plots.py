"""The figures of a full run: cost as prompts, steps, batches and models grow; where an engine wins.

Colours are Okabe and Ito's, which colour-blind people tell apart; markers and dashes say the same
in print.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from bench import cases
from bench.bench_policy import ENGINES, GROWTH, MIDDLE
from bench.cases import Case
from bench.shapes import parameter_count
from ttt_fast.engines.cost import Machine, dense_ms, factored_ms

COLOURS = {"dense": "#0072B2", "factored": "#D55E00"}
MARKERS = {"dense": "s", "factored": "o"}
DASHES = {"dense": "--", "factored": "-"}
# Blue where dense wins, orange where factored does, white where they tie.
SHADES = LinearSegmentedColormap.from_list("engines", ["#D55E00", "#FFFFFF", "#0072B2"])
AXIS_NAMES = {
    "T": "tokens of a prompt, T",
    "K": "steps, K",
    "D": "prompts at once, D",
    "model": "parameters of the model",
}
# Nothing of the drawing program: the same result gives the same bytes.
METADATA = {"Software": None}


@dataclass(frozen=True)
class Point:
    """One measured case."""

    case: Case
    predicted_ms: dict[str, float]
    measured_ms: dict[str, float]


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw both figures of a result file into a folder; return what was written."""
    points = [
        Point(Case(**row["case"]), row["predicted_ms"], row["measured_ms"])
        for row in result["policy"]["rows"]
    ]
    words = f"{result['machine']}, float32, {result['datetime'][:10]}"
    speeds = result["policy"]["policy"]
    machine = Machine(**{k: tuple(v) if isinstance(v, list) else v for k, v in speeds.items()})
    figures = {
        "benchmark-scaling.png": scaling(points, words),
        "benchmark-engines.png": engines(points, machine, words),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150, metadata=METADATA)
    return [folder / name for name in figures]


# ---------------------------------------------------------------------------- growth


def along(points: Iterable[Point], axis: str) -> Iterator[tuple[float, Point]]:
    """The points that differ from the middle in one thing, in order of it."""
    found = []
    for point in points:
        value = getattr(point.case, axis)
        if point.case == replace(MIDDLE, **{axis: value}):
            found.append((parameter_count(value) if axis == "model" else value, point))
    yield from sorted(found, key=lambda pair: pair[0])


def scaling(points: list[Point], words: str) -> Figure:
    """A panel for each thing that grows: measured times, and predicted ones as lines."""
    growth = {axis: found for axis in GROWTH if (found := list(along(points, axis)))}
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).flat
    for panel, (axis, found) in zip(panels, growth.items(), strict=False):
        for engine in ENGINES:
            at = [value for value, _ in found]
            panel.plot(
                at, [p.predicted_ms[engine] for _, p in found], DASHES[engine],
                color=COLOURS[engine], linewidth=1, label=f"{engine}, predicted",
            )  # fmt: skip
            panel.plot(
                at, [p.measured_ms.get(engine) for _, p in found], MARKERS[engine],
                color=COLOURS[engine], label=f"{engine}, measured",
            )  # fmt: skip
        _logarithmic(panel, AXIS_NAMES[axis], "ms of a step of a prompt")
        if axis != "model":
            panel.set_xticks(GROWTH[axis], [str(value) for value in GROWTH[axis]])
            panel.minorticks_off()
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(
        f"Cost beside {MIDDLE.model}, T = {MIDDLE.T}, K = {MIDDLE.K}, D = {MIDDLE.D}\n{words}"
    )
    return figure


def _logarithmic(panel: Axes, x: str, y: str) -> None:
    panel.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    panel.grid(True, which="major", linewidth=0.3)


# ---------------------------------------------------------------------------- the map


def engines(points: list[Point], machine: Machine, words: str) -> Figure:
    """Tokens by steps of one prompt: predicted advantage as shades, measured winners as marks."""
    tokens, steps = np.geomspace(8, 1024, 36), np.geomspace(1, 100, 28)
    work = cases.workload(MIDDLE)
    advantage = np.array([[_advantage(work, machine, T, K) for T in tokens] for K in steps])
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    panel = figure.subplots()
    shades = panel.pcolormesh(
        tokens, steps, advantage, cmap=SHADES, norm=LogNorm(0.25, 4), shading="nearest"
    )
    panel.contour(tokens, steps, advantage, levels=[1.0], colors="black", linewidths=1)
    for engine in ENGINES:
        won = [p for p in points if _on_map(p.case) and _winner(p) == engine]
        panel.plot(
            [p.case.T for p in won], [p.case.K for p in won], MARKERS[engine], color="black",
            markerfacecolor="white", label=f"{engine} measured faster",
        )  # fmt: skip
    _logarithmic(panel, AXIS_NAMES["T"], AXIS_NAMES["K"])
    bar = figure.colorbar(shades, ax=panel, label="time of factored / time of dense, predicted")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.ax.minorticks_off()
    # Both shades are as dark in print.
    for engine, corner in {"factored": (0.02, 0.09), "dense": (0.85, 0.75)}.items():
        panel.text(*corner, engine, transform=panel.transAxes, fontsize="large", weight="bold")
    panel.legend(loc="upper right", fontsize="small")
    panel.set_title(
        f"Where each engine wins: one prompt, {MIDDLE.model}, all\n{words}", fontsize=10
    )
    return figure


def _advantage(work: Any, machine: Machine, T: float, K: float) -> float:
    here = replace(work, tokens=round(T), steps=round(K))
    return factored_ms(here, machine) / dense_ms(here, machine)


def _on_map(case: Case) -> bool:
    return case == replace(MIDDLE, T=case.T, K=case.K)


def _winner(point: Point) -> str:
    return min(point.measured_ms, key=point.measured_ms.__getitem__)
