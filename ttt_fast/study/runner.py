"""Run a study: adapt, look, write a line; and go on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ttt_fast import ops
from ttt_fast.conditions import model_name, versions
from ttt_fast.config import SPAN_OPTIONS, TTTConfig
from ttt_fast.study.grid import Grid, Setting
from ttt_fast.study.plan import Plan, Portion, Unit, draw, fitting, portions
from ttt_fast.study.report import StudyReport
from ttt_fast.study.results import (
    Results,
    line_of,
    open_configuration,
    read_lines,
    require_shared,
)
from ttt_fast.study.scoring import score
from ttt_fast.study.shards import Shard, joined
from ttt_fast.study.stream import stream_states
from ttt_fast.study.tasks import Task, find_task, load_examples
from ttt_fast.study.trajectories import Point, SideBySide, State, dense_states, factored_states

# Prompts that are scored together with the original weights.
_UNADAPTED_AT_ONCE = 8


def study(
    task: str,
    model: nn.Module,
    tokenizer: Any,
    data: str | Path,
    out: str | Path,
    *,
    grid: Grid | None = None,
    prompts: int | None = None,
    seed: int = 0,
    chat: bool = False,
    max_new_tokens: int | None = None,
    segment_tokens: int | None = None,
    delta_norm: bool = True,
    sha256: str | None = None,
    engine: str = "auto",
    memory_budget: int | None = None,
    name: str | None = None,
    show: Callable[[str], None] | None = None,
    only_plan: bool = False,
    progress: bool = False,
    **options: Any,
) -> StudyReport:
    """Adapt a model to the prompts of a task with every setting of a grid, and score it.

        report = study("memo-trap", model, tokenizer, "memo_trap.jsonl", "results",
                       grid=Grid(lr=(1e-4, 1e-3), steps=(0, 20, 40)), prompts=32)
        report.write("results")

    Results go to the folder line by line. The same call goes on with what is missing there, with
    the same digits; a call with other settings is refused; one with more prompts adds them.
    Started by ``torchrun``, the processes share the work and all return the report of the whole.

    Args:
        task: a name of :data:`ttt_fast.study.TASKS`.
        model: a Hugging Face causal language model. Its weights come back bit for bit.
        tokenizer: its tokenizer.
        data: the task's file, JSON lines.
        out: folder of the results.
        grid: settings and steps; default the published sweep, with the task's own steps.
        prompts: how many, drawn by ``seed``; default all.
        seed: of the draw, and of stochastic rounding.
        chat: wrap prompts in the chat template; not plain text.
        max_new_tokens: of generated answers; default the task's.
        segment_tokens: of a segment of "text-stream"; default the task's.
        delta_norm: measure ‖W − W₀‖; exact, and on long trajectories as slow as the steps.
        sha256: refuse a file whose hash does not begin with this.
        engine: as in :class:`TTTConfig`; "auto" decides for each optimizer and scope.
        memory_budget: bytes above the model; default a share of what is free.
        name: of the model, in the report.
        show: told the plan before anything runs.
        only_plan: stop there; nothing is written, and the report is of what the folder has.
        progress: show a bar with the time left.
        **options: further fields of :class:`TTTConfig` for all settings: layers, backend, ...

    Raises:
        ResultsError: the folder is another study's, or cannot be written to.
        ValueError: bad input; nothing has run.
    """
    chosen, folder = _with_segments(find_task(task), segment_tokens), Path(out)
    grid = grid or Grid(**chosen.axes)
    _check_options(chosen, chat, delta_norm, options)
    new_tokens = _new_tokens(chosen, max_new_tokens)
    examples = load_examples(chosen, data, sha256)
    drawn = draw(examples.rows, prompts, seed)
    kept, *skipped = fitting(chosen, drawn, model, tokenizer, chat, new_tokens)

    def configuration() -> dict[str, Any]:
        budget = {"memory_budget": memory_budget, "engine": engine}
        wanted = {
            "identity": {
                "task": chosen.name,
                "data": examples.sha256,
                "weights": str(ops.checksum([p.detach() for p in model.parameters()])),
                "dtype": str(model.dtype).removeprefix("torch."),
                **grid.as_dict(),
                "seed": seed,
                "chat": chat,
                "max_new_tokens": new_tokens,
                "delta_norm": delta_norm,
                "engine": engine,
                "options": {key: repr(value) for key, value in sorted(options.items())},
                **({"segment_tokens": chosen.segment_tokens} if chosen.segment_tokens else {}),
            },
            "prompts": len(drawn),
            "skipped": dict(zip(("too_long", "too_short"), skipped, strict=True)),
            "portions": [
                p.as_dict() for p in portions(chosen, model, grid, kept, **budget, **options)
            ],
            "about": _about(model, name, data, examples.known),
        }
        return wanted if only_plan else open_configuration(folder, wanted)

    with joined() as shard:
        found = shard.agree(configuration)
        how = [Portion.of(portion) for portion in found["portions"]]
        plan = Plan(chosen, grid, kept, how, *skipped, score_tokens=new_tokens)
        if show is not None and shard.first:
            show(plan.page())
        if not only_plan:
            require_shared(folder, found)
            with Results(folder, (shard.rank, shard.world)) as results:
                settings = options | {"seed": seed}
                _Run(plan, model, tokenizer, results, delta_norm, settings).all(shard, progress)
            shard.wait()
    return StudyReport(list(read_lines(folder)), found, plan.page())


def _check_options(task: Task, chat: bool, delta_norm: bool, options: dict[str, Any]) -> None:
    varied = {f.name for f in fields(Grid)} | {"steps"}
    wrong = sorted(varied & set(options))
    if wrong:
        raise ValueError(
            f"study: {', '.join(wrong)} is what the grid varies; give Grid({wrong[0]}=(...,))."
        )
    known = {f.name for f in fields(TTTConfig)} - {"check_every", *SPAN_OPTIONS}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"study: {', '.join(unknown)} is not a setting of TTTConfig for a study.")
    if chat and task.plain_text:
        raise ValueError(f"study: chat=True; {task.name} adapts to a text, not a turn of a chat.")
    if delta_norm and options.get("snapshot") == "undo":
        raise ValueError(
            "study: snapshot='undo' keeps no copy of the original weights to measure the change"
            " from. Give delta_norm=False, or another snapshot."
        )


def _with_segments(task: Task, given: int | None) -> Task:
    """The task, with segments of another length if one is given."""
    if given is None:
        return task
    if not task.segment_tokens or given < 2:
        what = "it must be at least 2" if task.segment_tokens else f"{task.name} has no segments"
        raise ValueError(f"study: segment_tokens={given}; {what}.")
    return replace(task, segment_tokens=given)


def _new_tokens(task: Task, given: int | None) -> int:
    """Tokens of an answer, at most; 0 for a task without."""
    if given is not None and (task.judge is None or given < 1):
        what = "it must be at least 1" if task.judge else f"{task.name} generates nothing"
        raise ValueError(f"study: max_new_tokens={given}; {what}.")
    return (given or task.max_new_tokens) if task.judge else 0


def _about(model: nn.Module, name: str | None, data: str | Path, known: bool) -> dict[str, Any]:
    """What else the numbers may depend on."""
    return {
        "model": name or model_name(model),
        "file": Path(data).name,
        "known_file": known,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


class _Run:
    """The work of one process."""

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        tokenizer: Any,
        results: Results,
        delta_norm: bool,
        options: dict[str, Any],
    ) -> None:
        self._plan = plan
        self._model = model
        self._tokenizer = tokenizer
        self._results = results
        self._delta_norm = delta_norm
        self._options = options
        # Scores of the original weights, by the prompt's id; the same for every setting.
        self._unadapted = {
            prompt: _scores_of(line)
            for (prompt, _, step), line in results.lines.items()
            if step == 0
        }
        self._trainer: tuple[Any, SideBySide] | None = None

    def all(self, shard: Shard, progress: bool) -> None:
        """Every unit of this process's share that is not complete."""
        units = list(self._plan.units())[shard.rank :: shard.world]
        missing = [unit for unit in units if self._missing(unit)]
        total = sum(self._plan.n_steps(unit) for unit in units)
        left = sum(self._plan.n_steps(unit) for unit in missing)
        with tqdm(
            total=total, initial=total - left, disable=not progress, unit="step",
            desc=self._plan.task.name, position=shard.rank,
        ) as bar:  # fmt: skip
            for unit in missing:
                done = bar.n
                self._unit(unit, bar.update)
                # What a trajectory that diverged left out.
                bar.update(done + self._plan.n_steps(unit) - bar.n)

    def _missing(self, unit: Unit) -> bool:
        return any(
            self._key(pair, step) not in self._results.lines
            for pair in unit.pairs
            for step in self._plan.grid.steps
        )

    def _id(self, prompt: int) -> str:
        return self._plan.prompts[prompt].example.id

    def _key(self, pair: tuple[int, Setting], step: int) -> tuple[str, Setting, int]:
        return self._id(pair[0]), pair[1], step

    def _unit(self, unit: Unit, on_step: Callable[[int], None]) -> None:
        """All steps of a unit; those of its lines that are missing are written.

        The whole of it runs again after an interruption, so that the digits are the same.
        """
        if 0 in self._plan.grid.steps:
            self._score_unadapted(unit.prompts)
        with closing(self._states(unit, on_step)) as states:
            for state in states:
                keys = [self._key(pair, state.step) for pair in unit.pairs]
                if all(key in self._results.lines for key in keys):
                    continue
                scores = self._scores(unit, state)
                found = zip(keys, unit.pairs, state.points, scores, strict=True)
                lines = [
                    line_of(*key, self._belonging(prompt) | vars(point) | each)
                    for key, (prompt, _), point, each in found
                    if key not in self._results.lines
                ]
                self._results.append(lines)

    def _states(self, unit: Unit, on_step: Callable[[int], None]) -> Iterator[State]:
        steps = self._plan.grid.steps
        trainer = self._trainer_of(unit)
        prompts = [self._plan.prompts[n].prompt for n, _ in unit.pairs]
        settings = [setting for _, setting in unit.pairs]
        size = self._plan.task.segment_tokens
        if size:
            return stream_states(trainer, prompts, settings, steps, size, on_step, self._delta_norm)
        if unit.engine == "dense":
            return dense_states(trainer, prompts[0], steps, on_step, self._delta_norm)
        return factored_states(trainer, prompts, settings, steps, on_step, self._delta_norm)

    def _trainer_of(self, unit: Unit) -> SideBySide:
        """The trainer of a unit; the last one is kept, with its buffers."""
        first = unit.settings[0]
        key = (unit.engine, first.scope if unit.engine == "factored" else first)
        if self._trainer is None or self._trainer[0] != key:
            self._trainer = None  # before the next one, whose buffers take as much memory
            # A step that is not finite is to be noticed before the state is looked at.
            config = first.config(
                steps=self._plan.longest_trajectory,
                engine=unit.engine,
                check_every=1,
                **self._options,
            )
            self._trainer = (key, SideBySide(self._model, config))
        return self._trainer[1]

    def _scores(self, unit: Unit, state: State) -> list[dict[str, Any]]:
        """Of every trajectory of a unit at a state, while the model computes with it."""
        numbers = [n for n, _ in unit.pairs]
        if state.step == 0:
            scores = [self._unadapted[self._id(n)] for n in numbers]
        elif all(point.diverged_at is not None for point in state.points):
            scores = [{} for _ in numbers]
        elif state.scores is not None:
            scores = state.scores
        else:
            scores = self._score(numbers)
        return [
            each if point.diverged_at is None or state.step == 0 else self._diverged()
            for each, point in zip(scores, state.points, strict=True)
        ]

    def _score_unadapted(self, prompts: Sequence[int]) -> None:
        """Score the original weights on these prompts, and on those that go with them.

        Which ones go together does not depend on who asks: digits depend on it a little.
        """
        for first in sorted({n - n % _UNADAPTED_AT_ONCE for n in prompts}):
            last = min(first + _UNADAPTED_AT_ONCE, len(self._plan.prompts))
            numbers = range(first, last)
            if all(self._id(n) in self._unadapted for n in prompts if n in numbers):
                continue
            for n, each in zip(numbers, self._score(numbers), strict=True):
                if None in (*each.get("likelihoods", ()), each.get("nll", 0.0)):
                    raise ValueError(
                        "study: the model as it is gives prompt"
                        f" {self._id(n)!r} a likelihood that is not finite, so"
                        " nothing can be measured on it. Load it in another dtype, or with another"
                        " attn_implementation."
                    )
                self._unadapted.setdefault(self._id(n), each)

    def _score(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        prompts = [self._plan.prompts[n] for n in numbers]
        plan = self._plan
        return score(self._model, plan.task, prompts, self._tokenizer, plan.score_tokens)

    def _belonging(self, prompt: int) -> dict[str, str]:
        """What the report divides or clusters prompts by."""
        example = self._plan.prompts[prompt].example
        belonging = {"cluster": example.cluster, "group": example.group}
        return {name: value for name, value in belonging.items() if value is not None}

    def _diverged(self) -> dict[str, Any]:
        """The scores of weights that are not finite: nothing is right."""
        shares = [metric for metric in self._plan.task.metrics if metric != "nll"]
        nll = {"nll": None} if "nll" in self._plan.task.metrics else {}
        return {"correct": dict.fromkeys(shares, False), **nll}


def _scores_of(line: dict[str, Any]) -> dict[str, Any]:
    """The scores in a result, without what belongs to its setting."""
    own = {"prompt", "setting", "step", "cluster", "group", *Point.__dataclass_fields__}
    return {name: value for name, value in line.items() if name not in own}
