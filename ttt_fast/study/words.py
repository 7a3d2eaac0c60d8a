"""Numbers and tables of a study as text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from ttt_fast.study.analysis import Cell
from ttt_fast.study.intervals import Estimate


def csv_text(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The content of a CSV file."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([heads, *rows])
    return out.getvalue()


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first on the left."""
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [heads, *rows]
    )


def number(value: float, metric: str, sign: bool = False) -> str:
    """A share in percent, a likelihood or loss as it is."""
    if math.isnan(value):
        return "-"
    plus = "+" if sign else ""
    return f"{value:{plus}.4f}" if metric in ("nll", "loss") else f"{100 * value:{plus}.1f}"


def shown_estimate(estimate: Estimate, metric: str, sign: bool = False) -> str:
    """A mean with its interval: 62.5 [45.3, 77.1]."""
    mean, low, high = (
        number(each, metric, sign) for each in (estimate.mean, estimate.low, estimate.high)
    )
    return mean if math.isnan(estimate.low) else f"{mean} [{low}, {high}]"


def shown_cell(cell: Cell | None, metric: str) -> str:
    """A cell's mean with its interval, "-" where there is none."""
    return "-" if cell is None else shown_estimate(cell.value, metric)


def value_words(value: Any) -> str:
    """A setting's value as tables have it."""
    return "none" if value is None else value if isinstance(value, str) else f"{value:g}"
