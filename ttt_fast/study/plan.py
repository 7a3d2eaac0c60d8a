"""What a study will do, in which portions, and what that is predicted to take.

The portions are fixed before the first step and kept in the folder of the results: a study that was
interrupted goes on with the same prompts and settings side by side, and so to the same digits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ttt_fast.batch import context_length
from ttt_fast.engines.policy import free_bytes
from ttt_fast.study.grid import Grid, Setting
from ttt_fast.study.scoring import segments
from ttt_fast.study.stream import tokens_a_step
from ttt_fast.study.tasks import Encoded, Example, Task
from ttt_fast.trainer import TTTTrainer

# Beyond this many deltas side by side another one saves nothing any more, and its factors wait.
_MOST_AT_ONCE = 16
# Of the memory that is free: others use the machine, too, and a study runs for hours.
_SHARE_OF_FREE_MEMORY = 0.5
# Prompts of a window are put side by side by length; more prompts later leave whole windows alone.
_PORTIONS_A_WINDOW = 4


@dataclass(frozen=True)
class Portion:
    """How the trajectories of some settings run: the settings of one scope that share an engine.

    Attributes:
        engine: "factored" or "dense".
        settings: they run together as far as they fit.
        at_once: trajectories (of a prompt and a setting) side by side.
        ms: predicted milliseconds of a step of one trajectory.
        nbytes: predicted peak above the model.
        reason: why this engine.
    """

    engine: str
    settings: tuple[Setting, ...]
    at_once: int
    ms: float
    nbytes: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; :meth:`of` reads it."""
        return vars(self) | {"settings": [setting.as_dict() for setting in self.settings]}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Portion:
        """A portion from what :meth:`as_dict` gave."""
        settings = tuple(Setting.of(each) for each in values["settings"])
        return cls(**(values | {"settings": settings}))


@dataclass(frozen=True)
class Unit:
    """Trajectories that run together: every prompt with every setting.

    Attributes:
        engine: "factored" or "dense".
        prompts: numbers of prompts in the plan.
        settings: of one scope.
    """

    engine: str
    prompts: tuple[int, ...]
    settings: tuple[Setting, ...]

    @property
    def pairs(self) -> list[tuple[int, Setting]]:
        """Prompt and setting of each trajectory."""
        return [(prompt, setting) for prompt in self.prompts for setting in self.settings]


@dataclass(frozen=True)
class Plan:
    """Everything that a study will do.

    Attributes:
        task: the task.
        grid: settings and steps.
        prompts: those that are adapted to, in the order in which they were drawn.
        portions: how settings run.
        too_long: ids of prompts that were drawn and do not fit the model's context.
        too_short: ids of those with fewer tokens than the task needs.
        score_tokens: tokens generated for an answer, at most.
    """

    task: Task
    grid: Grid
    prompts: list[Encoded]
    portions: list[Portion]
    too_long: list[str] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)
    score_tokens: int = 0

    @property
    def n_trajectories(self) -> int:
        """Prompts times settings."""
        return len(self.prompts) * sum(len(portion.settings) for portion in self.portions)

    @property
    def n_lines(self) -> int:
        """Results that there will be."""
        return self.n_trajectories * len(self.grid.steps)

    def units(self) -> Iterator[Unit]:
        """All trajectories, by windows of prompts: what is done first has seen every setting."""
        at_once = max(_prompts_at_once(portion) for portion in self.portions)
        window = _PORTIONS_A_WINDOW * at_once if at_once > 1 else 1
        for first in range(0, len(self.prompts), window):
            numbers = range(first, min(first + window, len(self.prompts)))
            by_length = sorted(numbers, key=lambda n: self.prompts[n].prompt.numel())
            for portion in self.portions:
                yield from _units(portion, by_length)

    def n_steps(self, unit: Unit) -> int:
        """Steps that all trajectories of a unit take."""
        return len(unit.settings) * sum(
            self._steps_of(self.prompts[n].prompt.numel()) for n in unit.prompts
        )

    @property
    def longest_trajectory(self) -> int:
        """Steps of one trajectory, at most."""
        longest = max(encoded.prompt.numel() for encoded in self.prompts)
        return _trajectory(self.task, self.grid, longest)

    def _steps_of(self, n_tokens: int) -> int:
        """Steps that one setting takes on a prompt, to all numbers of steps that are looked at."""
        if not self.task.segment_tokens:
            return self.grid.steps[-1]
        return sum(self.grid.steps) * len(segments(n_tokens, self.task.segment_tokens))

    @property
    def predicted_s(self) -> float:
        """Seconds that the whole is predicted to take."""
        return sum(self._seconds(portion) for portion in self.portions)

    @property
    def predicted_bytes(self) -> int:
        """Predicted peak of memory above the model."""
        return max(portion.nbytes for portion in self.portions)

    def _seconds(self, portion: Portion) -> float:
        looks = len([step for step in self.grid.steps if step > 0])
        n_rows = len(self.prompts[0].continuations)
        # A forward of a row, or of one more token, takes about a third of a step.
        scoring = looks * (n_rows + self.score_tokens) / 3
        steps = sum(self._steps_of(each.prompt.numel()) + scoring for each in self.prompts)
        return 1e-3 * portion.ms * steps * len(portion.settings)

    def page(self) -> str:
        """For people, before it starts."""
        lengths = sorted(encoded.prompt.numel() for encoded in self.prompts)
        steps = ", ".join(map(str, self.grid.steps))
        lines = [
            f"{self.task.title}: {len(self.prompts)} prompts of {lengths[0]} to {lengths[-1]}"
            f" tokens (median {lengths[len(lengths) // 2]}),"
            f" {self.n_trajectories // len(self.prompts)} settings, looked at after {steps} steps:"
            f" {self.n_trajectories} trajectories, {self.n_lines} results",
        ]
        for portion in self.portions:
            first = portion.settings[0]
            side = f", {portion.at_once} side by side" if portion.at_once > 1 else ""
            lines.append(
                f"  {first.optimizer} on {first.scope}: {len(portion.settings)} settings,"
                f" {portion.engine} engine{side}, about"
                f" {duration(self._seconds(portion))} and {portion.nbytes / 2**30:.2f} GiB above"
                " the model"
            )
            lines.append(f"    {portion.reason}")
        lines.append(
            f"predicted: {duration(self.predicted_s)} in all,"
            f" {self.predicted_bytes / 2**30:.2f} GiB above the model at most"
        )
        for ids, why in (
            (self.too_long, "longer than the model's context"),
            (self.too_short, f"shorter than {self.task.least_tokens} tokens"),
        ):
            if ids:
                some = ", ".join(ids[:5]) + ", ..." * (len(ids) > 5)
                lines.append(f"skipped, {why}: {len(ids)} ({some})")
        return "\n".join(lines)


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3.5 h, 12 days."""
    for size, name, form in ((86400, "days", ".1f"), (3600, "h", ".1f"), (60, "min", ".0f")):
        if seconds >= 2 * size or (name == "h" and seconds >= size):
            return f"{seconds / size:{form}} {name}"
    return f"{seconds:.0f} s"


# ---------------------------------------------------------------------------- which prompts


def draw(examples: Sequence[Example], n: int | None, seed: int) -> list[Example]:
    """The first ``n`` rows of a shuffle by ``seed``: more prompts later contain the first ones.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    order = list(examples)
    random.Random(seed).shuffle(order)
    if n is None:
        return order
    if not 1 <= n <= len(order):
        raise ValueError(f"study: prompts={n}; the file has 1 to {len(order)}.")
    return order[:n]


def fitting(
    task: Task,
    examples: Sequence[Example],
    model: nn.Module,
    tokenizer: Any,
    chat: bool,
    max_new_tokens: int,
) -> tuple[list[Encoded], list[str], list[str]]:
    """Examples in tokens; ids of those too long for the model's context, and too short.

    Raises:
        ValueError: none fits.
    """
    context = context_length(model)
    kept: list[Encoded] = []
    too_long: list[str] = []
    too_short: list[str] = []
    for example in examples:
        encoded = task.encode(example, tokenizer, chat)
        lengths = [continuation.numel() for continuation in encoded.continuations]
        behind = max(lengths, default=0)
        total = encoded.prompt.numel() + max(behind, max_new_tokens)
        if context is not None and total > context:
            too_long.append(example.id)
        elif encoded.prompt.numel() < task.least_tokens or 0 in lengths:
            too_short.append(example.id)
        else:
            kept.append(encoded)
    if not kept:
        raise ValueError(
            f"study: none of the {len(examples)} prompts can be used: {len(too_long)} are longer"
            f" than the model's context of {context} (with what is scored behind them),"
            f" {len(too_short)} shorter than {task.least_tokens} tokens. Use other prompts or"
            " another model."
        )
    return kept, too_long, too_short


# ---------------------------------------------------------------------------- how they run


def portions(
    task: Task,
    model: nn.Module,
    grid: Grid,
    prompts: Sequence[Encoded],
    memory_budget: int | None = None,
    **options: Any,
) -> list[Portion]:
    """Divide the settings among the engines as the policy predicts.

    Args:
        task: of the prompts.
        model: the model.
        grid: the settings.
        prompts: what is adapted to.
        memory_budget: bytes above the model; default a share of what is free.
        **options: further fields of :class:`TTTConfig`.

    Raises:
        ValueError: the options do not go with one of the settings, or with the model.
    """
    device = model.get_input_embeddings().weight.device
    if memory_budget is None:
        free = free_bytes(device)
        memory_budget = None if free is None else max(1, int(_SHARE_OF_FREE_MEMORY * free))
    lengths = [encoded.prompt.numel() for encoded in prompts]
    tokens = lengths
    if task.segment_tokens:
        size = task.segment_tokens
        tokens = [tokens_a_step([encoded.prompt for encoded in prompts], size)]
    together: dict[tuple[str, str], list[Setting]] = {}
    for setting in grid.settings():
        together.setdefault((setting.scope, setting.optimizer), []).append(setting)
    found = []
    for settings in together.values():
        n_steps = _trajectory(task, grid, max(lengths))
        own = {"steps": n_steps, "memory_budget": memory_budget}
        configs = [setting.config(**own, **options) for setting in settings]
        # With momentum the dense engine needs most.
        trainer = TTTTrainer(model, max(configs, key=lambda config: config.momentum))
        most = min(_MOST_AT_ONCE, len(settings) * len(prompts))
        found.append(_portion(trainer, tuple(settings), tokens, most))
    return found


def _trajectory(task: Task, grid: Grid, n_tokens: int) -> int:
    """Steps of the longest trajectory on a prompt of so many tokens."""
    size = task.segment_tokens
    return grid.steps[-1] * (len(segments(n_tokens, size)) if size else 1)


def _portion(
    trainer: TTTTrainer, settings: tuple[Setting, ...], tokens: Sequence[int], most: int
) -> Portion:
    """How settings run on prompts of so many tokens each.

    What is side by side is of about one length, so time is that of a prompt of mean length; memory
    is that of the longest.
    """
    longest, mean = max(tokens), round(sum(tokens) / len(tokens))
    limit = trainer.config.max_batch_tokens
    if limit is not None:
        most = max(1, min(most, limit // longest))
    at_once = next(n for n in range(most, 0, -1) if n == 1 or _fits(trainer, n, longest))
    # The dense engine goes through them one by one.
    at_most, choice = (trainer.plan(at_once, n, in_turn=True) for n in (longest, mean))
    budget = trainer.config.memory_budget
    if budget is not None and at_most.predicted_bytes[choice.engine] > budget:
        choice = at_most
    return Portion(
        choice.engine,
        settings,
        at_once if choice.engine == "factored" else 1,
        choice.predicted_ms[choice.engine],
        at_most.predicted_bytes[choice.engine],
        choice.reason,
    )


def _fits(trainer: TTTTrainer, n: int, longest: int) -> bool:
    """Whether the factored engine has the memory for n trajectories side by side."""
    budget = trainer.config.memory_budget
    needed = trainer.plan(n, longest).predicted_bytes.get("factored")
    return needed is not None and (budget is None or needed <= budget)


def _prompts_at_once(portion: Portion) -> int:
    return max(1, portion.at_once // len(portion.settings))


def _units(portion: Portion, prompts: Sequence[int]) -> Iterator[Unit]:
    """The prompts of a window with every setting of a portion."""
    if portion.engine == "dense":
        # A setting at a time: its trainer, with the snapshot, is made once a window.
        for setting in portion.settings:
            for prompt in prompts:
                yield Unit("dense", (prompt,), (setting,))
        return
    n_prompts = _prompts_at_once(portion)
    n_settings = min(portion.at_once, len(portion.settings))
    for first in range(0, len(prompts), n_prompts):
        block = tuple(prompts[first : first + n_prompts])
        for start in range(0, len(portion.settings), n_settings):
            yield Unit("factored", block, portion.settings[start : start + n_settings])
