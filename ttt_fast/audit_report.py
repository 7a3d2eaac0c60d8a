"""What an audit found, and how it is shown: a page for people, JSON, a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["MODES", "AuditReport", "AuditRow", "Mode", "brief"]

# |Δx|/|y| below which rounding of the activations (2e-3 of an element in bfloat16) drowns what Δ
# does. Measured for bfloat16; float16 has three bits more.
ACTIVATION_LIMITS = {"bfloat16": 7e-4, "float16": 7e-4 / 8}


@dataclass(frozen=True)
class Mode:
    """One way to write an update.

    Attributes:
        label: in the table and the plot.
        options: what it sets in :class:`TTTConfig`.
        words: what it does.
        narrow: makes a difference for 16-bit weights only.
        refusable: its engine does not take every model.
    """

    label: str
    options: dict[str, str]
    words: str
    narrow: bool = False
    refusable: bool = False


MODES: dict[str, Mode] = {
    "torch": Mode(
        "stock torch",
        {"engine": "dense", "rounding": "torch"},
        "rounding='torch': clip_grad_norm_ and the optimizer, rounded after every operation",
    ),
    "nearest": Mode(
        "one rounding",
        {"engine": "dense", "rounding": "nearest"},
        "rounding='nearest': the same step in float32, rounded once",
    ),
    "delta": Mode(
        "fp32 delta",
        {"engine": "dense", "accumulate": "delta"},
        "accumulate='delta': a float32 delta; the forward reads round(weight + delta)",
        narrow=True,
    ),
    "stochastic": Mode(
        "stochastic",
        {"engine": "dense", "rounding": "stochastic"},
        "rounding='stochastic': right on average; 'moved' shows the noise that it pays with",
        narrow=True,
    ),
    "factored": Mode(
        "factored",
        {"engine": "factored"},
        "engine='factored': the delta stays beside the weights, nothing is rounded away",
        refusable=True,
    ),
    "float32": Mode(
        "float32 model",
        {"engine": "dense", "rounding": "nearest"},
        "the reference: a float32 copy of the model",
        narrow=True,
    ),
}


@dataclass(frozen=True)
class AuditRow:
    """One mode at one learning rate. What could not be measured is None.

    Attributes:
        mode: key of :data:`MODES`.
        lr: learning rate.
        update_landed: Σ⟨W' − W, Δ⟩ / Σ‖Δ‖² over the steps, Δ the float32 update and W the weights
            that the forward reads.
        changed: share of the selected weights that differ from the originals after the last step;
            None for the factored engine, which writes no weight.
        moved: ‖W_K − W_0‖ over the selected weights; with the factored engine, of what the forward
            computes with.
        activation_change: of the float32 model: ‖(W_K − W_0) x‖ / ‖W_0 x‖, the median of its whole
            adapted ``nn.Linear``; None without one. Below about 7e-4 bfloat16 activations hide the
            update in every mode.
        grad_norm: of the first step, before clipping.
        loss_before: loss of the prompt before the first step.
        loss_after: loss of the prompt after the last step.
        diverged_at: step whose loss was not finite, counted from 1; one more than there are steps
            where only the last update did it. None if all were finite.
        refused: why this mode cannot run on this model.
    """

    mode: str
    lr: float
    update_landed: float | None = None
    changed: float | None = None
    moved: float | None = None
    activation_change: float | None = None
    grad_norm: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    diverged_at: int | None = None
    refused: str | None = None


@dataclass(frozen=True)
class AuditReport:
    """What :func:`audit` found; ``print(report)`` shows it.

    Attributes:
        rows: by learning rate, then in the order of :data:`MODES`.
        conditions: everything that the numbers depend on, JSON-able.
        notes: what was left out, and why.
        restored: the model's selected weights are, by checksum, what they were.
    """

    rows: list[AuditRow]
    conditions: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    restored: bool = True

    def __str__(self) -> str:
        return self.page()

    def conclusion(self) -> str:
        """One sentence on the first mode that was asked for, stock torch unless left out."""
        mode = min((row.mode for row in self.rows), key=list(MODES).index)
        dtype = self.conditions["dtype"]
        who = f"a stock {dtype} loop" if mode == "torch" else f"{MODES[mode].label} in {dtype}"
        rows = [row for row in self.rows if row.mode == mode]
        shares = {row.lr: row.update_landed for row in rows if row.update_landed is not None}
        if not shares:
            return _sentence(f"{who} took no step that could be measured; see the table.")
        least, low = min(shares.values()), min(shares)
        # More than 1 is rounding, too: steps that reach the next bfloat16 number only just.
        if least >= 0.99 and max(shares.values()) <= 1.01:
            return (
                f"In {dtype} everything lands here: {who} applies at least {_percent(least)} of"
                " its update at every learning rate audited."
            )
        start = f"At lr {brief(low)} {who} applies {_percent(shares[low])} of its update: "
        swallowed = [lr for lr, share in shares.items() if share < 0.5]
        if not swallowed:
            return f"{start}a part of a sweep over learning rates is rounding."
        if max(swallowed) == max(shares):
            return f"{start}this whole sweep, up to lr {brief(max(shares))}, measures rounding."
        return (
            f"{start}a sweep over learning rates of {brief(max(swallowed))} and below measures"
            " rounding."
        )

    def table(self) -> str:
        """One aligned line for each learning rate and mode."""
        heads = ("lr", "mode", "update_landed", "changed", "moved", "loss before", "loss after")
        lines = [(*heads, "")]
        for row in self.rows:
            lines.append((
                brief(row.lr),
                MODES[row.mode].label,
                _number(row.update_landed, "{:.4f}"),
                "-" if row.changed is None else _percent(row.changed),
                _number(row.moved, "{:.3g}"),
                _loss(row.loss_before),
                _loss(row.loss_after),
                self._remark(row),
            ))  # fmt: skip
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        return "\n".join(
            f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  "
            + "  ".join(f"{cell:>{w}}" for cell, w in zip(line[2:7], widths[2:], strict=True))
            + (f"  {line[7]}" if line[7] else "")
            for line in lines
        )

    def page(self) -> str:
        """The report for people: conclusion, table, what the words mean, the limit."""
        c = self.conditions
        clip = "no clip" if c["max_grad_norm"] is None else f"clip {c['max_grad_norm']:g}"
        decay = f", weight decay {c['weight_decay']:g}" if c["weight_decay"] else ""
        momentum = f" with momentum {c['momentum']:g}" if c["optimizer"] == "sgd" else ""
        lines = [
            self.conclusion(),
            "",
            f"{c['model']} in {c['dtype']} on {c['device']}: {c['steps']} steps of"
            f" {c['optimizer']}{momentum}, {clip}{decay}, on"
            f" {_count(c['selected_parameters'])} parameters (scope {c['scope']}),"
            f" {c['tokens']} tokens",
            "",
            self.table(),
            "",
            "update_landed: share of the intended updates that reached the weights the forward"
            " reads",
            "changed: share of these weights that differ after the last step; moved: how far,"
            " ‖W_K − W_0‖",
        ]
        shown = {row.mode for row in self.rows}
        width = max(len(MODES[mode].label) for mode in shown)
        lines += [f"{m.label:<{width}}  {m.words}" for name, m in MODES.items() if name in shown]
        lines += ["", *filter(None, [self._limit()]), *self.notes]
        if not self.restored:
            lines.append("THE WEIGHTS DID NOT COME BACK")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All numbers, conditions and versions; strict JSON, null for what was not measured."""
        content = {
            "conclusion": self.conclusion(),
            "limit": self._limit(),
            "conditions": self.conditions,
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
            "restored": self.restored,
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def plot(self, path: str | Path) -> None:
        """Draw update_landed and the final loss against the learning rate into a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 6.6), layout="constrained")
        landed, loss = figure.subplots(2, 1, sharex=True)
        for name, look in _LOOKS.items():
            rows = [r for r in self.rows if r.mode == name and r.refused is None]
            if rows:
                _draw(landed, rows, [r.update_landed for r in rows], look, MODES[name].label)
                _draw(loss, rows, [self._drawn_loss(r) for r in rows], look, MODES[name].label)
        landed.set_ylabel("update_landed")
        landed.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
        before = [row.loss_before for row in self.rows if row.loss_before is not None]
        if before:
            loss.axhline(before[0], color="0.4", linewidth=1, linestyle=(0, (1, 3)), zorder=0)
            loss.annotate("before", (0.995, before[0]), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8, color="0.3")  # fmt: skip
        loss.set_ylabel(f"loss of the prompt after {self.conditions['steps']} steps")
        loss.set_xlabel("learning rate" + self._crosses())
        loss.set_xscale("log")
        for axes in (landed, loss):
            axes.grid(True, which="major", color="0.9", linewidth=0.6)
            axes.margins(y=0.08)
        handles, labels = landed.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=150, format="png")

    def _drawn_loss(self, row: AuditRow) -> float | None:
        """None for a loss so large that it would squash all others into one line."""
        if row.loss_after is None or row.loss_after > 3 * row.loss_before:
            return None
        return row.loss_after

    def _crosses(self) -> str:
        gone = any(self._drawn_loss(row) is None for row in self.rows if row.refused is None)
        return "   (× at the top: diverged, or a loss above three times that before)" * gone

    def _remark(self, row: AuditRow) -> str:
        if row.refused is not None:
            return f"refused: {row.refused}"
        if row.diverged_at is None:
            return ""
        if row.diverged_at > self.conditions["steps"]:
            return "diverged after the last step"
        return f"diverged at step {row.diverged_at}"

    def _limit(self) -> str | None:
        """The limit of everything above, with the numbers of this model where there are any."""
        dtype = next((d for d in ACTIVATION_LIMITS if d in self.conditions["dtype"]), None)
        if dtype is None:
            return None
        limit = ACTIVATION_LIMITS[dtype]
        text = (
            f"Limit: where an update changes a layer's output by less than about {brief(limit)} of"
            f" it (|Δx|/|y|), rounding of {dtype} activations dominates in every mode, element by"
            " element, whatever update_landed says: what comes through is right on average only."
        )
        ratios = {r.lr: r.activation_change for r in self.rows if r.activation_change is not None}
        if ratios:
            numbers = ", ".join(f"{brief(ratio)} at lr {brief(lr)}" for lr, ratio in ratios.items())
            text += f" Here, in the median layer of the float32 model, it is {numbers}."
            hidden = [lr for lr, ratio in ratios.items() if ratio < limit]
            if hidden:
                lower = " and lower" if len(hidden) > 1 else ""
                text += f" So lr {brief(max(hidden))}{lower} is below the limit."
            else:
                text += " All of it is above the limit."
        return text


# ---------------------------------------------------------------------------- how it looks

# Okabe and Ito's colours, which colour-blind people tell apart; markers and dashes for print.
_LOOKS: dict[str, dict[str, Any]] = {
    "torch": dict(color="#000000", marker="o", linestyle="-", markersize=6),
    "nearest": dict(color="#D55E00", marker="s", linestyle="--", markersize=8, fillstyle="none"),
    "delta": dict(color="#0072B2", marker="^", linestyle="-", markersize=6),
    "stochastic": dict(color="#E69F00", marker="D", linestyle=":", markersize=6),
    "factored": dict(color="#009E73", marker="P", linestyle="-.", markersize=7),
    "float32": dict(color="#56B4E9", marker="o", linestyle="--", markersize=10, fillstyle="none"),
}


def _draw(
    axes: Any,
    rows: Sequence[AuditRow],
    values: Sequence[float | None],
    look: dict[str, Any],
    label: str,
) -> None:
    """One mode's line; where there is no value, a cross at the top."""
    lrs = [row.lr for row in rows]
    axes.plot(lrs, [math.nan if v is None else v for v in values], label=label, **look)
    gone = [lr for lr, value in zip(lrs, values, strict=True) if value is None]
    axes.plot(gone, [0.96] * len(gone), "x", color=look["color"], markersize=9,
              transform=axes.get_xaxis_transform())  # fmt: skip


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def brief(number: float) -> str:
    """A learning rate or a ratio in at most three digits: 2.5e-4."""
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _percent(share: float) -> str:
    percent = 100 * share
    # Rounded down: 99.96 % is not everything.
    return f"{math.floor(10 * percent) / 10:.1f} %" if percent >= 10 else f"{percent:.2g} %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _loss(value: float | None) -> str:
    return _number(value, "{:.4f}" if value is None or abs(value) < 1e4 else "{:.3g}")


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"
