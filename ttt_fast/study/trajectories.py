"""One way through many steps: the states of some trajectories at the steps that are looked at.

The factored engine takes all steps and goes back, for any number of prompts and settings side by
side; the dense engine is looked at on the way, one prompt with one setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ttt_fast.adaptation import Adaptation
from ttt_fast.batch import Batch, complete_batch
from ttt_fast.conditions import finite
from ttt_fast.config import TTTConfig
from ttt_fast.engines.dense import DenseEngine
from ttt_fast.model_state import require_free
from ttt_fast.prompts import prompt_batch
from ttt_fast.rounding import compute_dtype
from ttt_fast.session import DivergedError, Session
from ttt_fast.study.grid import Setting
from ttt_fast.trainer import TTTTrainer


@dataclass(frozen=True)
class Point:
    """One trajectory after some steps. What is not finite, or was not measured, is None.

    Attributes:
        loss: of the prompt.
        grad_norm: of the last gradient that was taken, before clipping; at step 0 of the first.
        delta_norm: ‖W − W₀‖.
        update_landed: share of the updates so far that reached the weights.
        diverged_at: the step, from 1, that could not be taken or led to a loss that is not finite;
            None if all is well. What else there is belongs to the last finite weights.
    """

    loss: float | None
    grad_norm: float | None
    delta_norm: float | None
    update_landed: float
    diverged_at: int | None = None


@dataclass(frozen=True)
class State:
    """All trajectories of a unit after some steps, while the model computes with them.

    Attributes:
        step: number of steps.
        points: one each.
        scores: what was scored on the way, one each; None where the model is to be asked now.
    """

    step: int
    points: list[Point]
    scores: list[dict[str, Any]] | None = None


class SideBySide(TTTTrainer):
    """A trainer that adapts prompts with settings of their own together."""

    def begin_pairs(self, configs: Sequence[TTTConfig], n_tokens: int, **found: Any) -> Session:
        """Begin with a delta for each of the settings.

        One that diverges keeps its last finite weights and is marked; the others go on.

        Args:
            configs: they may differ in lr, momentum, weight decay and clip; in the dense engine
                there is one, the trainer's own.
            n_tokens: tokens that a delta sees in a step.
            **found: what else of the prompts :meth:`plan` takes.
        """
        work = self._work(len(configs), n_tokens, **found)
        choice = self._planner.choose(work)
        own = {"configs": list(configs)} if choice.engine == "factored" else {}
        return self._begin(work, choice, keep_diverged=True, **own)

    def adapt_pairs(
        self,
        prompts: Sequence[Tensor],
        configs: Sequence[TTTConfig],
        on_step: Callable[[Any], None] | None = None,
    ) -> Adaptation:
        """Adapt prompt n with the settings n, each on its own.

        One that diverges keeps its last finite weights and is marked; the others go on.

        Args:
            prompts: ids (T,) each.
            configs: they may differ in lr, momentum, weight decay and clip.
            on_step: called after every step.
        """
        batch = prompt_batch(self.model, self.tokenizer, list(prompts), deltas="independent")
        require_free(self.model)
        begin = partial(self.begin_pairs, configs, batch.input_ids.shape[1], **self._found(batch))
        return self._adapt(begin, batch, on_step, None, False)


def factored_states(
    trainer: SideBySide,
    prompts: Sequence[Tensor],
    settings: Sequence[Setting],
    steps: Sequence[int],
    on_step: Callable[[int], None],
    delta_norm: bool = True,
) -> Iterator[State]:
    """Trajectory n is prompt n with setting n; all of one scope.

    Args:
        trainer: of that scope, engine "factored".
        prompts: ids (T,) each.
        settings: of SGD.
        steps: where to look, ascending.
        on_step: told how many steps were taken since it was told last.
        delta_norm: measure it; on long trajectories that takes as long as the steps.
    """
    configs = [replace(trainer.config, **setting.as_dict()) for setting in settings]
    # Those that do not fit together take turns, each all its steps.
    adapted = trainer.adapt_pairs(
        prompts, configs, lambda report: on_step(int((~report.losses.isnan()).sum()))
    )
    with adapted:
        last = adapted.loss() if steps[-1] == trainer.config.steps else None
        for step in steps:
            adapted.rewind(step)
            norms = adapted.delta_norm().tolist() if delta_norm else [None] * len(prompts)
            points = [
                _point(adapted, delta, step, last, norms[delta]) for delta in range(len(prompts))
            ]
            yield State(step, points)


def _point(
    adapted: Adaptation, delta: int, step: int, last: Tensor | None, delta_norm: float | None
) -> Point:
    losses, norms = adapted.losses[delta], adapted.grad_norms[delta]
    loss = losses[step] if step < losses.numel() else last[delta]
    # The update after the first gradient that is not finite was not made, nor any behind it.
    bad = (~(losses.isfinite() & norms.isfinite())).nonzero().flatten().tolist()
    diverged_at = bad[0] + 1 if bad and step > bad[0] else None
    if diverged_at is None and not math.isfinite(float(loss)):
        diverged_at = max(1, step)
    return Point(
        finite(loss) if diverged_at is None else None,
        finite(norms[max(0, step - 1)]),
        finite(delta_norm),
        float(adapted.update_landed[delta]),
        diverged_at,
    )


def dense_states(
    trainer: TTTTrainer,
    prompt: Tensor,
    steps: Sequence[int],
    on_step: Callable[[int], None],
    delta_norm: bool = True,
) -> Iterator[State]:
    """The trajectory of one prompt, looked at on the way.

    The state of step 0 comes when the first gradient is known, and the first step taken: what is to
    be scored with the original weights is scored before.

    Args:
        trainer: with the setting, engine "dense" and check_every=1.
        prompt: ids (T,).
        steps: where to look, ascending.
        on_step: told how many steps were taken since it was told last.
        delta_norm: measure it.
    """
    batch = complete_batch(Batch(prompt[None]), trainer.model, 1)
    norm = None
    with trainer.begin(1, prompt.numel()) as session:
        parts = session.parts(batch)
        for step in range(1, steps[-1] + 1):
            try:
                report = session.step_parts(parts)
            except DivergedError as error:
                point = Point(None, finite(norm), None, session.engine.landed(0), error.step)
                before = Point(None, None, 0.0, 1.0, error.step)  # the very first loss was not
                yield from (State(k, [point if k else before]) for k in steps if k >= step or not k)
                return
            on_step(1)
            norm = report.grad_norms[0]
            if step == 1 and 0 in steps:
                yield State(0, [Point(finite(report.losses[0]), finite(norm), 0.0, 1.0)])
            if step in steps:
                yield State(step, [_dense_point(session, batch, norm, step, delta_norm)])


def _dense_point(
    session: Session, batch: Batch, norm: Tensor, step: int, delta_norm: bool
) -> Point:
    loss = finite(session.loss(batch)[0])
    return Point(
        loss,
        finite(norm),
        finite(distance(session.engine)) if delta_norm else None,
        session.engine.landed(0),
        diverged_at=step if loss is None else None,
    )


@torch.no_grad()
def distance(engine: DenseEngine) -> float:
    """‖W − W₀‖ of the weights that are in the model."""
    square = 0.0
    for now, before in zip(engine.views, engine.snapshot.originals, strict=True):
        wide = compute_dtype(now.dtype)
        difference = now.to(wide) - before.to(device=now.device, dtype=wide)
        square += float(torch.linalg.vector_norm(difference).double().square())
    return math.sqrt(square)
