"""The report of a study as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttt_fast.study.figures import Drawn
    from ttt_fast.study.report import StudyReport

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 76rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.2rem; }
p.small, figcaption { color: #555; font-size: .87rem; max-width: 62rem; }
pre { background: #f6f6f4; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e4e0; text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #999; background: #fff; position: sticky; top: 0; }
figure { margin: 1.4rem 0; } img { max-width: 100%; }
summary { cursor: pointer; }
"""
# Longer tables are folded.
_FOLDED_ROWS = 40

_LIMITS = """Read with care. Intervals are over the prompts of this study and this model only, each
at one setting: the best of many settings is better than it is, by chance. update_landed says which
share of the updates reached the weights that the forward reads; at points with little of it a curve
measures rounding, not learning. A trajectory that diverged counts as wrong in a share of right
answers, and is left out of a mean likelihood, where the number of those is given. "Chosen by the
least" takes the setting and step with the least mean of what can be seen without labels, or those
of each prompt by itself. What compares settings is over the prompts that all of them have."""

_CHOICES = """Which setting would have been chosen without labels: what came of it, the change from
not adapting prompt by prompt, and the rank correlation of less of it with better values over
settings and steps. (Prompts that are drawn again rank settings less surely than all of them
together, so a correlation stands near the outer end of its interval.)"""

_SENSITIVITY = """How much each choice matters: means of what differs in nothing else, the spread
between the best and the worst value, and what it is below in 95 % of the cases if the choice does
not matter (each prompt's results are exchanged among the values at random; p is the share of such
cases with a spread as large)"""

_FINDINGS = """What "When Test-Time Training Fails" reports, and whether it holds here: all else
equal, with the 95 % interval of the difference when prompts are drawn again (paired bootstrap; the
best and the worst of many settings are chosen on the same prompts, so those rows flatter; of so
many intervals a few miss 0 by chance)"""


def html_page(report: StudyReport, figures: Sequence[Drawn]) -> str:
    """The page; figures are in it as PNG."""
    title = f"{report.task.title}: test-time training, setting by setting"
    head, *details = report.heading().splitlines()
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(head)}.<br>{escape(' '.join(details))}.</p>"]
    parts += [f'<p class="small">{escape(" ".join((report.task.note, _LIMITS)))}</p>']
    for metric, words in report.task.metrics.items():
        unit = "" if metric == "nll" else ", % of the prompts"
        parts.append(f"<h2>{escape(metric)}: {escape(words)}{unit}</h2>")
        parts += [f"<p><b>{escape(text)}</b></p>" for text in report.conclusions(metric)]
        parts += [_figure(f) for f in figures if f.name.startswith(f"{metric}_")]
        parts.append(_table("Values after each number of steps", *report.steps_table(metric)))
        for group, analysis in report.groups(metric).items():
            parts.append(_table(f"Only {group}", *report.steps_table(metric, analysis)))
        parts.append(_table(
            "Robustness: best and worst over the steps, mean change along them (area), and how far"
            " the final values of the learning rates lie apart",
            *report.robustness_table(metric),
        ))  # fmt: skip
        parts.append(_table(_CHOICES, *report.choices_table(metric)))
        parts.append(_table(_SENSITIVITY, *report.sensitivity_table(metric)))
        parts.append(_table(_FINDINGS, *report.findings_table(metric)))
    parts.append("<h2>The loss of the prompts</h2>")
    parts += [_figure(f) for f in figures if f.name.startswith("loss_")]
    parts.append(_table(_FINDINGS, *report.findings_table("loss")))
    parts += ["<h2>What was run</h2>", f"<pre>{escape(report.plan)}</pre>", _conditions(report)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _figure(figure: Drawn) -> str:
    image = base64.b64encode(figure.png).decode()
    return (
        f'<figure><img alt="{escape(figure.title)}" src="data:image/png;base64,{image}">'
        f"<figcaption><b>{escape(figure.title)}.</b> {escape(figure.words)}</figcaption></figure>"
    )


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that can be folded; nothing where it has no rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
        "</div>"
    )
    folded = "" if len(rows) > _FOLDED_ROWS else " open"
    return f"<details{folded}><summary>{escape(caption)}</summary>{table}</details>"


def _conditions(report: StudyReport) -> str:
    """Everything that the numbers depend on."""
    rows = {**report.configuration["about"], **report.configuration["identity"]}
    rows |= rows.pop("versions")
    lines = [[name, str(value)] for name, value in rows.items()]
    return _table("Conditions", ["", ""], lines)
