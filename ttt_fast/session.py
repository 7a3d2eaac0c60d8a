"""A session: the primitive under every way to adapt. Steps on batches, then an :class:`Adaptation`.

    session = trainer.begin(n_deltas=1)
    for batch in batches:
        session.step(batch)
    adapted = session.end()

What a step sees is the caller's choice: the same prompt again, other rows, spans or neighbours,
text that was just scored. Whatever happens inside, the weights come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttt_fast import placement, profiling
from ttt_fast.batch import Batch, complete_batch, forward_arguments
from ttt_fast.config import TTTConfig
from ttt_fast.engines.checkpointing import Checkpointing
from ttt_fast.engines.dense import DenseEngine
from ttt_fast.engines.factored import FactoredEngine
from ttt_fast.engines.policy import Choice
from ttt_fast.engines.prefix import FrozenPrefix
from ttt_fast.frozen_keys import FrozenKeys, complete_contexts, prefill
from ttt_fast.history import History
from ttt_fast.interrupt import uninterrupted
from ttt_fast.model_state import evaluating, hold, release, require_free, training
from ttt_fast.objective import Objective, delta_losses, fused_reduction
from ttt_fast.profiling import Phases
from ttt_fast.rounding import compute_dtype
from ttt_fast.span_cache import reading

if TYPE_CHECKING:
    from ttt_fast.adaptation import Adaptation

Engine = DenseEngine | FactoredEngine


class DivergedError(RuntimeError):
    """A loss or gradient norm was not finite. The weights have been restored.

    Attributes:
        step: the step at which it happened, counted from 1.
        delta: the delta.
    """

    def __init__(self, message: str, step: int, delta: int) -> None:
        super().__init__(message)
        self.step = step
        self.delta = delta


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: number of the step, counted from 1.
        losses: (D,) loss of each delta before its update; NaN for a delta that had no row in the
            batch.
        grad_norms: (D,) global gradient norm before clipping, likewise.
    """

    step: int
    losses: Tensor
    grad_norms: Tensor

    def of(self, delta: int) -> StepReport:
        """The report of one delta: NaN for the others."""
        others = torch.arange(len(self.losses), device=self.losses.device) != delta
        return StepReport(
            self.step,
            self.losses.masked_fill(others, torch.nan),
            self.grad_norms.masked_fill(others, torch.nan),
        )


@dataclass(frozen=True)
class LoopState:
    """What all steps of a session have left, for another session to go on from.

    Attributes:
        measured: (S, 2, D) losses and gradient norms.
        found_inf: (D,).
        taken: the deltas of each step.
        engine: what the engine noted on the host.
    """

    measured: Tensor
    found_inf: Tensor
    taken: list[tuple[int, ...]]
    engine: Any


class Session:
    """Steps on one or several deltas, from :meth:`TTTTrainer.begin`; its ``with`` block aborts."""

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        config: TTTConfig,
        n_deltas: int,
        objective: Objective,
        keep_diverged: bool = False,
        choice: Choice | None = None,
        **begin: Any,
    ) -> None:
        require_free(model)
        self.model = model
        self.engine = engine
        self.config = config
        self.n_deltas = n_deltas
        self.objective = objective
        self.keep_diverged = keep_diverged
        self.choice = choice
        param = engine.selections[0].param
        self.phases = Phases(param.device)
        self._dtype = compute_dtype(param.dtype)
        self._clear()
        waits = placement.look_waits(self.phases.device)
        self._check_every = config.check_every or (max(1, config.steps) if waits else 1)
        self._arguments = forward_arguments(model)
        self._prefix = FrozenPrefix(model, config.dropout)
        planned = config.checkpointing is True if choice is None else choice.checkpointing
        self._checkpointing = (
            Checkpointing(model, config.dropout, engine.recomputing) if planned else None
        )
        self._open = True
        hold(model, self)
        try:
            with uninterrupted(), self.phases("snapshot"):
                engine.begin(n_deltas, **begin)
        except BaseException:
            engine.cancel()
            self._release()
            raise

    # ------------------------------------------------------------------ the public steps

    @torch.inference_mode(False)
    def step(self, batch: Batch) -> StepReport:
        """Take one gradient step on the deltas that have rows in the batch.

        Raises:
            DivergedError: a loss or norm is not finite (looked at every ``check_every`` steps).
            ValueError: the batch does not fit; the session goes on.
        """
        self._require_open()
        return self.step_parts(self.parts(complete_batch(batch, self.model, self.n_deltas)))

    def parts(self, batch: Batch) -> list[tuple[tuple[int, ...], Batch]]:
        """What goes through the model together: deltas and their rows, of a complete batch."""
        return parts_of(batch, self.engine, self.config, self.choice)

    @torch.inference_mode(False)
    def step_parts(self, parts: Sequence[tuple[tuple[int, ...], Batch]]) -> StepReport:
        """:meth:`step` on the :meth:`parts` of a batch, for the same one many times.

        Checking a batch and dividing it by delta waits for the device; this does not.
        """
        self._require_open()
        with self._unharmed(), profiling.annotate("step", self.phases.device):
            row = self._take_step(parts)
            if self.steps % self._check_every == 0:
                self._check()
        return StepReport(self.steps, *row)

    @torch.inference_mode(False)
    def loss(self, batch: Batch) -> Tensor:
        """Loss of each delta on a batch, without a gradient: (D,), NaN where it has no row."""
        self._require_open()
        batch = complete_batch(batch, self.model, self.n_deltas)
        losses = self._nan_per_delta()
        with self._unharmed():
            for deltas, rows in self.parts(batch):
                with self.engine.showing(deltas):
                    losses[deltas[0] : deltas[-1] + 1] = evaluate(
                        self.model, rows, self.objective, self._arguments, len(deltas), self.engine
                    )
        return losses

    @torch.inference_mode(False)
    def prefill(self, contexts: Batch) -> FrozenKeys:
        """Keys and values of contexts with the unadapted weights, for steps on spans of them.

        Args:
            contexts: one in each row, with ``delta_index``; labels and weights do not matter.

        Raises:
            ValueError: the contexts do not fit, or the model gives no keys and values.
        """
        self._require_open()
        contexts = complete_contexts(contexts, self.model, self.n_deltas)
        with self._unharmed(), self.phases("prefill"):
            return unadapted_keys(self.model, self.engine, contexts)

    def end(self) -> Adaptation:
        """Stop training; the adaptation takes over the session's hold of the model."""
        from ttt_fast.adaptation import Adaptation

        self._require_open()
        with self._unharmed(), uninterrupted():
            self._check()
            self.engine.settle()
            adaptation = Adaptation.of(self)
            self._open = False
            self._prefix.forget()
            hold(self.model, adaptation)
        return adaptation

    # ------------------------------------------------------------------ all steps at once

    @property
    def checkpointed(self) -> bool:
        """Whether decoder layers are computed again in the backward pass."""
        return self._checkpointing is not None

    @torch.inference_mode(False)
    def record(self, parts: Sequence[tuple[tuple[int, ...], Batch]]) -> LoopState:
        """All steps of each part in turn, for a graph: nobody looks at what they give.

        Whatever is raised inside, :meth:`restart` or :meth:`abort` is for the caller to do.
        """
        self._require_open()
        self._clear()
        self.engine.open_recording()
        for part in parts:
            for _ in range(self.config.steps):
                self._take_step([part])
        measured, taken = self.history.unread()
        return LoopState(measured, self._found_inf, taken, self.engine.bookkeeping())

    @torch.inference_mode(False)
    def adopt(self, state: LoopState) -> None:
        """Go on from where a replay of :meth:`record` has come; nothing of it is shared."""
        self._require_open()
        with self._unharmed():
            self.steps = len(state.taken)
            self.history.replace(state.measured.clone(), state.taken)
            self._found_inf = state.found_inf.clone()
            self.engine.adopt(state.engine)
            self._check()

    @torch.inference_mode(False)
    def restart(self) -> None:
        """Be as after :meth:`TTTTrainer.begin`: original weights, no steps."""
        self._require_open()
        with self._unharmed(), uninterrupted():
            self.engine.start_over()
            self._prefix.forget()
            self._clear()

    # ------------------------------------------------------------------ the end

    def abort(self) -> None:
        """Give up: restore the weights, bit for bit. A session that has ended is left alone."""
        if not self._open:
            return
        with uninterrupted():
            with self.phases("restore"):
                self.engine.restore()
            self._release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()

    # ------------------------------------------------------------------ details

    @property
    def diverged(self) -> Tensor:
        """(D,) bool: a step was not finite; the delta stays as it was before it."""
        return self._found_inf != 0

    def _take_step(self, parts: Sequence[tuple[tuple[int, ...], Batch]]) -> Tensor:
        """One step, at which nobody looks; returns (losses, norms), (2, D)."""
        self.steps += 1
        row = self.history.open_step()
        for deltas, rows in parts:
            span = slice(deltas[0], deltas[-1] + 1)
            row[0, span], row[1, span] = self._step_together(deltas, rows)
        self.engine.finish_step(self._found_inf)
        self.history.close_step(row, [delta for deltas, _ in parts for delta in deltas])
        return row

    def _step_together(self, deltas: tuple[int, ...], rows: Batch) -> tuple[Tensor, Tensor]:
        """Forward, backward and update of some deltas; returns (losses, norms), (n,) each."""
        engine, seed = self.engine, self._dropout_seed(deltas[0])

        def forward() -> Any:
            if seed is not None:
                torch.manual_seed(seed)
            return self.model(**rows.model_inputs(self._arguments))

        with (
            uninterrupted() as held,
            training(self.model, engine, dropout=seed is not None),
            engine.recording(deltas, rows),
            self._prefix.reused(rows),
            nullcontext() if self._checkpointing is None else self._checkpointing.around(rows),
            reading(self.model, rows.past_key_values, self.config.dropout),
            engine.head.answering(rows, len(deltas), fused_reduction(self.objective)) as call,
        ):
            with self.phases("forward"), held.released():
                outputs, losses = engine.head.run(call, forward, engine.mark)
                if losses is None:
                    losses = delta_losses(self.objective, outputs, rows, len(deltas))
                del outputs
            if not losses.requires_grad:
                raise ValueError(
                    "adapt: the loss does not depend on the selected parameters (scope"
                    f" {self.config.scope!r}), so there is nothing to learn. Choose another scope"
                    " or objective."
                )
            with self.phases("backward"), held.released():
                losses.sum().backward()
            losses = losses.detach()
            found_inf = self._found_inf[deltas[0] : deltas[-1] + 1]
            found_inf.copy_(torch.maximum(found_inf, (~torch.isfinite(losses)).to(found_inf)))
            with self.phases("update"):
                norms = engine.update(deltas, self._found_inf)
        return losses, norms

    def _clear(self) -> None:
        """No steps yet."""
        self.steps = 0
        self.history = History(self.n_deltas, self._dtype, self.phases.device)
        self._found_inf = torch.zeros(self.n_deltas, device=self.phases.device)

    def _nan_per_delta(self) -> Tensor:
        return torch.full((self.n_deltas,), torch.nan, dtype=self._dtype, device=self.phases.device)

    def _dropout_seed(self, delta: int) -> int | None:
        if not self.config.dropout:
            return None
        return self.config.random_stream(delta, self.steps)

    def _check(self) -> None:
        """Look at the losses and norms since the last look; only here the device is waited for."""
        found = None if self.keep_diverged else self.history.first_not_finite()
        if found is not None:
            raise self._diverged(*found)

    def _diverged(self, step: int, delta: int, loss: float, norm: float) -> DivergedError:
        name = f" of delta {delta}" if self.n_deltas > 1 else ""
        clip = self.config.max_grad_norm
        advice = "a max_grad_norm (no clipping was asked for)" if clip is None else (
            f"a smaller max_grad_norm than {clip:g}"
        )  # fmt: skip
        return DivergedError(
            f"adapt: step {step}{name} is not finite (loss {loss}, gradient norm {norm}); the"
            " original weights have been restored. Try an lr smaller than"
            f" {self.config.lr_at(step - 1):g}, or {advice}.",
            step=step,
            delta=delta,
        )

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """Whatever is raised inside, restore the weights before passing it on."""
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def _require_open(self) -> None:
        if not self._open:
            raise RuntimeError(
                "this session is over (ended, aborted, or restored after an error); begin another."
            )

    def _release(self) -> None:
        self._open = False
        self._prefix.forget()
        release(self.model)


def parts_of(
    batch: Batch, engine: Engine, config: TTTConfig, choice: Choice | None = None
) -> list[tuple[tuple[int, ...], Batch]]:
    """The deltas of a complete batch that an engine takes through the model together, with rows.

    Args:
        batch: complete.
        engine: only the factored one takes several.
        config: settings.
        choice: what was planned: how many are trained at once in the memory there is.
    """
    if not engine.together:
        return batch.runs(0)
    return batch.runs(config.max_batch_tokens, None if choice is None else choice.deltas_at_once)


def evaluate(
    model: nn.Module,
    rows: Batch,
    objective: Objective,
    arguments: frozenset[str],
    n_deltas: int,
    engine: Engine,
) -> Tensor:
    """Loss of each delta's rows with what the model computes now, without a gradient: (n,)."""
    with (
        uninterrupted() as held,
        torch.no_grad(),
        evaluating(model),
        reading(model, rows.past_key_values),
        engine.head.answering(rows, n_deltas, fused_reduction(objective)) as call,
        held.released(),
    ):
        outputs, losses = engine.head.run(
            call, lambda: model(**rows.model_inputs(arguments)), engine.mark
        )
        return delta_losses(objective, outputs, rows, n_deltas) if losses is None else losses


def unadapted_keys(model: nn.Module, engine: Engine, contexts: Batch) -> FrozenKeys:
    """Keys and values of complete contexts with the weights that an engine found."""
    with uninterrupted() as held, engine.unadapted(), evaluating(model), held.released():
        return prefill(model, contexts)
