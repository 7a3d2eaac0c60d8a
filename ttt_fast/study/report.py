"""What a study found, as tables, CSV files, figures and one page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ttt_fast.study.analysis import PREDICTORS, Analysis, Choice, groups_of
from ttt_fast.study.findings import Finding, correlation, findings
from ttt_fast.study.grid import Grid, Setting
from ttt_fast.study.intervals import Estimate
from ttt_fast.study.plan import Portion
from ttt_fast.study.results import (
    ResultsError,
    key_of,
    read_configuration,
    read_lines,
    write_atomically,
)
from ttt_fast.study.sensitivity import Sensitivity, sensitivities
from ttt_fast.study.tasks import Task, find_task
from ttt_fast.study.words import (
    csv_text,
    number,
    shown_cell,
    shown_estimate,
    text_table,
    value_words,
)

_SKIPPED = {"too_long": "longer than the model's context", "too_short": "too short for the task"}
AXIS_WORDS = {
    "lr": "learning rate", "steps": "steps", "optimizer": "optimizer",
    "weight_decay": "weight decay", "momentum": "momentum", "max_grad_norm": "clip",
    "scope": "adapted parts",
}  # fmt: skip
_SETTING_HEADS = ("optimizer", "lr", "weight_decay", "momentum", "max_grad_norm", "scope")


class StudyReport:
    """What :func:`study` found; ``print(report)`` shows the main table.

    Args:
        lines: results, in any order and from any number of processes.
        configuration: of the folder.
        plan: the plan's page, with what was skipped.
        n_studies: how many studies the results are from, each with settings and prompts of its own.
        n_missing: results that the studies are still to give.
    """

    def __init__(
        self,
        lines: Iterable[Mapping[str, Any]],
        configuration: Mapping[str, Any],
        plan: str = "",
        n_studies: int = 1,
        n_missing: int = 0,
    ) -> None:
        # In one order whoever wrote them, so that a report of the same results is the same bytes.
        unique = {key_of(line): line for line in lines}
        self.lines = [unique[key] for key in sorted(unique, key=_order)]
        self.configuration = configuration
        self.plan = plan
        self.n_studies = n_studies
        self.n_missing = n_missing

    @classmethod
    def read(cls, *folders: str | Path) -> StudyReport:
        """The report of what folders have so far, together; the studies may still be running.

        Studies of the same model, file and seed may each have settings and a number of prompts of
        their own: prompts are the first ones of one shuffle, so what two settings share can be
        compared.

        Raises:
            ResultsError: it is no study's folder, has no results yet, or the studies differ in
                more than that.
        """
        if not folders:
            raise ResultsError("StudyReport.read: no folder was given; name at least one.")
        configurations = [read_configuration(Path(folder)) for folder in folders]
        lines = [list(read_lines(Path(folder))) for folder in folders]
        for folder, found in zip(folders, lines, strict=True):
            if not found:
                raise ResultsError(f"{folder}: there are no results yet. Run the study first.")
        together = _together(folders, configurations)
        missing = sum(map(_n_missing, configurations, lines))
        page = "\n".join(_what_was_run(found) for found in configurations)
        return cls(itertools.chain(*lines), together, page, len(folders), missing)

    @property
    def task(self) -> Task:
        """The task."""
        return find_task(self.configuration["identity"]["task"])

    @cached_property
    def analyses(self) -> dict[str, Analysis]:
        """The curves of each metric."""
        return {metric: Analysis(self.lines, metric) for metric in self.task.metrics}

    @cached_property
    def compared(self) -> dict[str, Analysis]:
        """The same on the prompts that every setting has, for what compares settings."""
        return {metric: analysis.shared() for metric, analysis in self.analyses.items()}

    @cached_property
    def loss(self) -> Analysis:
        """The loss of the prompts, as a curve."""
        return Analysis(self.lines, "loss")

    def groups(self, metric: str) -> dict[str, Analysis]:
        """The curves of each group of prompts, where there are groups."""
        return {g: Analysis(self.lines, metric, g) for g in groups_of(self.lines)}

    @property
    def n_prompts(self) -> int:
        """Prompts that there are results of."""
        return len({line["prompt"] for line in self.lines})

    @property
    def n_diverged(self) -> int:
        """Trajectories that diverged at some step."""
        diverged = (line for line in self.lines if line["diverged_at"] is not None)
        return len({key_of(line)[:2] for line in diverged})

    # ------------------------------------------------------------------ tables

    def __str__(self) -> str:
        return self.page()

    def page(self) -> str:
        """The report for a terminal: a line for each setting and metric, and what loss tells."""
        parts = [self.heading()]
        for metric, words in self.task.metrics.items():
            parts += [f"{metric}: {words}", text_table(*self.steps_table(metric))]
            parts += self.conclusions(metric)
            tables = (self.findings_table(metric), self.sensitivity_table(metric))
            parts += [text_table(heads, rows) for heads, rows in tables if rows]
        return "\n\n".join(parts)

    def heading(self) -> str:
        """What was done, in a few lines."""
        about, identity = self.configuration["about"], self.configuration["identity"]
        known = "" if about["known_file"] else " (not the file that the task was written for)"
        lines = [
            f"{self.task.title}, {about['model']} in {identity['dtype']}: {self.n_prompts} prompts"
            f" of {about['file']}{known}, seed {identity['seed']}",
            f"{len(self.lines)} results, {self.n_diverged} trajectories diverged; in brackets 95 %"
            " intervals over prompts" + ", clustered" * any("cluster" in x for x in self.lines),
        ]
        first = next(iter(self.analyses.values()))
        counts = {cell.n_prompts for curve in first.curves.values() for cell in curve}
        if len(counts) > 1 and self.n_studies > 1:
            lines.append(
                f"{self.n_studies} studies: settings have {min(counts)} to {max(counts)} prompts; a"
                " mean is over a setting's own, a comparison over those that both sides have"
            )
        if self.n_missing or len(counts) > 1 and self.n_studies == 1:
            lines.append(
                f"NOT COMPLETE: settings have {min(counts)} to {max(counts)} prompts so far; what"
                " compares settings is over the prompts that all of them have"
            )
        skipped = self.configuration.get("skipped", {})  # older folders do not have it
        lines += [
            f"skipped, {what}: {len(skipped[name])} prompts ({_some(skipped[name])})"
            for name, what in _SKIPPED.items()
            if skipped.get(name)
        ]
        return "\n".join(lines)

    def steps_table(
        self, metric: str, analysis: Analysis | None = None
    ) -> tuple[list[str], list[list[str]]]:
        """Settings by steps: heads and rows, like the published tables."""
        analysis = analysis or self.analyses[metric]
        steps = sorted({cell.step for curve in analysis.curves.values() for cell in curve})
        heads = ["setting", *(f"step {step}" for step in steps), "landed", "n", "diverged"]
        rows = []
        for setting in sorted(analysis.curves, key=_setting_order):
            curve = analysis.curves[setting]
            by_step = {cell.step: cell for cell in curve}
            counts = {cell.value.n for cell in curve}
            n = str(max(counts))
            cells = [shown_cell(by_step.get(step), metric) for step in steps]
            if len(counts) > 1:  # several studies, or one that goes on
                of = {step: f", n {cell.value.n}" for step, cell in by_step.items()}
                cells = [cell + of.get(step, "") for cell, step in zip(cells, steps, strict=True)]
                n = f"{min(counts)} to {n}"
            last = curve[-1]
            rows.append([setting.words, *cells, f"{last.landed[1]:.3f}", n, str(last.n_diverged)])
        return heads, rows

    def robustness_table(self, metric: str) -> tuple[list[str], list[list[str]]]:
        """A line a setting: best, worst, area, sensitivity to lr."""
        heads = ["setting", "best (step)", "worst (step)", "area", "spread over lr", "diverged"]
        rows = [
            [
                row.setting.words,
                f"{number(row.best[0], metric)} ({row.best[1]})",
                f"{number(row.worst[0], metric)} ({row.worst[1]})",
                number(row.area, metric, sign=True),
                number(row.lr_spread, metric),
                str(row.n_diverged),
            ]
            for row in sorted(
                self.compared[metric].robustness(), key=lambda row: _setting_order(row.setting)
            )
        ]
        return heads, rows

    def choices_table(self, metric: str) -> tuple[list[str], list[list[str]]]:
        """What would have been chosen by what can be seen without labels, and the best there is."""
        heads = ["chosen by the least", "rank correlation", "points", "setting", "step", metric,
                 "change", "n"]  # fmt: skip
        analysis = self.compared[metric]

        def results(value: Estimate, change: Estimate) -> list[str]:
            changed = shown_estimate(change, metric, sign=True)
            return [number(value.mean, metric), changed, str(value.n)]

        rows = []
        choices = analysis.choices()
        for choice in choices:
            told = "-" if math.isnan(choice.correlation) else self._correlation(metric, choice)
            cell = choice.cell
            row = [PREDICTORS[choice.predictor][0], told, str(choice.n_points)]
            row += [choice.setting.words, str(cell.step), *results(cell.value, cell.change)]
            rows.append(row)
        for choice in choices:
            words = PREDICTORS[choice.predictor][0]
            of_each = analysis.chosen_by_prompt(choice.predictor)
            rows.append([f"{words}, of each prompt", "", "", "(its own)", "", *results(*of_each)])
        best = analysis.best()
        if best is not None:
            setting, cell = best
            shown = results(cell.value, cell.change)
            rows.append(["(best in hindsight)", "", "", setting.words, str(cell.step), *shown])
        if analysis.unadapted is not None:
            value = analysis.unadapted
            shown = [number(value.mean, metric), "", str(value.n)]
            rows.append(["(not adapted)", "", "", "", "0", *shown])
        return heads, rows

    def findings_table(self, metric: str) -> tuple[list[str], list[list[str]]]:
        """What others found, as far as the settings have both sides of it; see :mod:`findings`."""
        heads = ["reported", "one side", "other side", "settings and steps", "better by",
                 "prompts", "here"]  # fmt: skip
        rows = []
        for finding in self.findings[metric]:
            pairs = zip(finding.sides, finding.values, strict=True)
            sides = [f"{side}: {number(value, metric)}" for side, value in pairs]
            places = " and ".join(map(str, finding.n_places))
            difference = shown_estimate(finding.difference, metric, sign=True)
            row = [*sides, places, difference, str(finding.difference.n), finding.verdict]
            rows.append([finding.claim, *row])
        return heads, rows

    @cached_property
    def findings(self) -> dict[str, list[Finding]]:
        """The findings of each metric, and of the loss of the prompts."""
        every = {**self.analyses, "loss": self.loss}
        return {metric: findings(analysis) for metric, analysis in every.items()}

    @cached_property
    def sensitivities(self) -> dict[str, list[Sensitivity]]:
        """How much each choice matters to each metric."""
        return {metric: sensitivities(analysis) for metric, analysis in self.analyses.items()}

    @cached_property
    def correlations(self) -> dict[tuple[str, str], Estimate]:
        """(metric, predictor) -> rank correlation, on the prompts that all settings have."""
        return {
            (metric, predictor): correlation(analysis, predictor)
            for metric, analysis in self.compared.items()
            for predictor in PREDICTORS
        }

    def sensitivity_table(self, metric: str) -> tuple[list[str], list[list[str]]]:
        """How much each choice matters, and how much chance alone would make of it."""
        heads = ["choice", "means", "spread", "by chance below", "p", "compared", "prompts"]
        rows = []
        for each in self.sensitivities[metric]:
            means = ", ".join(
                f"{value_words(value)}: {number(mean, metric)}"
                for value, mean in each.means.items()
            )
            spreads = [number(value, metric) for value in (each.spread, each.by_chance)]
            counts = [str(each.n_groups), str(each.n_prompts)]
            rows.append([AXIS_WORDS[each.axis], means, *spreads, f"{each.p:.3f}", *counts])
        return heads, rows

    def _correlation(self, metric: str, choice: Choice) -> str:
        """A predictor's rank correlation with the metric, and its interval."""
        interval = self.correlations[metric, choice.predictor]
        text = f"{choice.correlation:+.2f}"
        if math.isnan(interval.low):
            return text
        return f"{text} [{interval.low:+.2f}, {interval.high:+.2f}]"

    def conclusions(self, metric: str) -> list[str]:
        """What loss would have chosen, in a sentence, if there is anything to say."""
        analysis = self.compared[metric]
        loss = next((c for c in analysis.choices() if c.predictor == "loss"), None)
        best, unadapted = analysis.best(), analysis.unadapted
        if loss is None or best is None or unadapted is None:
            return []
        told = (
            "no rank correlation, for one of both does not vary"
            if math.isnan(loss.correlation)
            else f"the rank correlation of a lower loss with a better value is"
            f" {self._correlation(metric, loss)} over {loss.n_points} settings and steps"
        )
        chosen, hindsight = loss.cell.value.mean, best[1].value.mean
        return [
            f"Chosen by the lowest loss of the prompts: {loss.setting.words}, step"
            f" {loss.cell.step}, {number(chosen, metric)}; not adapted"
            f" {number(unadapted.mean, metric)}; the best in hindsight"
            f" {number(hindsight, metric)}; {told} ({unadapted.n} prompts)."
        ]

    # ------------------------------------------------------------------ files

    def csv(self) -> str:
        """A row for each setting and step, all metrics, unrounded."""
        metrics = list(self.task.metrics)
        heads = [*_SETTING_HEADS, "step", "prompts", "diverged", *PREDICTORS, "update_landed",
                 "update_landed_least"]  # fmt: skip
        for metric in metrics:
            heads += [f"{metric}{end}" for end in ("", "_low", "_high", "_change", "_change_low",
                                                   "_change_high")]  # fmt: skip
        rows = []
        first = self.analyses[metrics[0]]
        for setting in sorted(first.curves, key=_setting_order):
            for i, cell in enumerate(first.curves[setting]):
                row: list[Any] = [asdict(setting)[head] for head in _SETTING_HEADS]
                counts = [cell.step, cell.n_prompts, cell.n_diverged]
                row += [*counts, *cell.means.values(), cell.landed[1], cell.landed[0]]
                for metric in metrics:
                    same = self.analyses[metric].curves[setting][i]
                    for each in (same.value, same.change):
                        row += [each.mean, each.low, each.high]
                rows.append(["" if _absent(value) else value for value in row])
        return csv_text(heads, rows)

    def write(self, folder: str | Path) -> list[Path]:
        """Write CSV files, the figures as PNG and report.html into a folder.

        table.csv has a row for each setting and step; for each metric there are the tables of
        robustness, of what would have been chosen without labels, of how much each choice matters,
        and of what others found.

        Returns:
            The files.

        Raises:
            ModuleNotFoundError: the figures need matplotlib.
            ResultsError: a file could not be written.
        """
        from ttt_fast.study.figures import draw_all
        from ttt_fast.study.page import html_page

        folder = Path(folder)
        figures = draw_all(self)
        files = {"table.csv": self.csv().encode()}
        for metric in self.task.metrics:
            for name, table in (
                ("robustness", self.robustness_table(metric)),
                ("without_labels", self.choices_table(metric)),
                ("sensitivity", self.sensitivity_table(metric)),
                ("findings", self.findings_table(metric)),
            ):
                files[f"{metric}_{name}.csv"] = csv_text(*table).encode()
        if self.findings["loss"]:
            files["loss_findings.csv"] = csv_text(*self.findings_table("loss")).encode()
        files |= {f"{figure.name}.png": figure.png for figure in figures}
        files["report.html"] = html_page(self, figures).encode()
        for name, content in files.items():
            write_atomically(folder / name, content)
        return [folder / name for name in files]


def _together(
    folders: Sequence[str | Path], configurations: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One configuration of studies that differ in their settings alone."""
    axes = [axis.name for axis in fields(Grid)]
    every = configurations
    first, *others = every
    identity = dict(first["identity"])
    for folder, other in zip(folders[1:], others, strict=True):
        for name, value in other["identity"].items():
            if name in axes:
                identity[name] = identity[name] + [v for v in value if v not in identity[name]]
            elif identity.get(name) != value:
                raise ResultsError(
                    f"{folder}: its results were made with {name}={value!r}, those of {folders[0]}"
                    f" with {identity.get(name)!r}. Only settings and the number of prompts may"
                    " differ; report them one by one."
                )
    skipped = {
        name: list(
            dict.fromkeys(itertools.chain(*(c.get("skipped", {}).get(name, ()) for c in every)))
        )
        for name in _SKIPPED
    }
    return dict(first) | {"identity": identity, "skipped": skipped}


def _n_missing(configuration: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> int:
    """Results that a study's configuration promises and its folder does not have."""
    grid = Grid(**{axis.name: configuration["identity"][axis.name] for axis in fields(Grid)})
    skipped = sum(map(len, configuration.get("skipped", {}).values()))
    n_prompts = configuration["prompts"] - skipped
    promised = n_prompts * len(grid.settings()) * len(grid.steps)
    return max(0, promised - len({key_of(line) for line in lines}))


def _what_was_run(configuration: Mapping[str, Any]) -> str:
    """A study's prompts, steps and portions, from its folder."""
    identity = configuration["identity"]
    lines = [
        f"{configuration['prompts']} prompts, looked at after"
        f" {', '.join(map(str, identity['steps']))} steps"
    ]
    for each in configuration["portions"]:
        portion = Portion.of(each)
        first = portion.settings[0]
        lines.append(
            f"  {first.optimizer} on {first.scope}: {len(portion.settings)} settings,"
            f" {portion.at_once} side by side, {portion.reason}"
        )
    return "\n".join(lines)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + ", ..." * (len(ids) > 5)


def _absent(value: Any) -> bool:
    return value is None or isinstance(value, float) and math.isnan(value)


def _setting_order(setting: Setting) -> tuple[Any, ...]:
    clip = setting.max_grad_norm
    return (
        setting.scope, setting.optimizer != "sgd", setting.weight_decay, setting.momentum,
        (0.0 if clip is None else 1.0, clip or 0.0), setting.lr,
    )  # fmt: skip


def _order(key: tuple[str, Setting, int]) -> tuple[Any, ...]:
    prompt, setting, step = key
    return prompt, _setting_order(setting), step
