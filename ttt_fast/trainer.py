"""The trainer: adapt a model to a prompt, use it, have the original weights back."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ttt_fast import profiling
from ttt_fast.adaptation import Adaptation
from ttt_fast.batch import Batch, complete_batch, context_length
from ttt_fast.config import Schedule, TTTConfig
from ttt_fast.engines import policy
from ttt_fast.engines.dense import DenseEngine
from ttt_fast.engines.factored import FactoredEngine
from ttt_fast.engines.planner import Planner
from ttt_fast.engines.work import Workload
from ttt_fast.frozen_keys import FrozenKeys
from ttt_fast.graphs import LoopGraphs, demand, obstacle, one_by_one
from ttt_fast.model_state import holder, require_free
from ttt_fast.objective import Objective, fused_reduction, negative_log_likelihood
from ttt_fast.prompts import as_prompts, prompt_batch
from ttt_fast.scope import select_parameters
from ttt_fast.session import Session, StepReport


class TTTTrainer:
    """Test-time training of a causal language model.

        ttt = TTTTrainer(model, TTTConfig(lr=1e-3, steps=20, scope="ffn"))
        with ttt.adapt(input_ids) as adapted:
            output_ids = adapted.generate(max_new_tokens=64)
        # the weights are bit for bit what they were, also after an exception

    Args:
        model: a Hugging Face causal language model, or a module with its interface. It stays the
            caller's: class, hooks, modes and gradient flags are as found whenever no step is
            running.
        config: settings.
        tokenizer: needed only to pass prompts as text.
        objective: ``objective(outputs, batch) -> (N,)`` row losses; default the negative
            log-likelihood of the rows.

    Raises:
        ValueError: the scope selects nothing, or weights that cannot be trained.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TTTConfig | None = None,
        tokenizer: Any = None,
        objective: Objective | None = None,
    ) -> None:
        self.model = model
        self._config = TTTConfig() if config is None else config
        self.tokenizer = tokenizer
        self._own_objective = objective is not None
        self.objective = objective or partial(
            negative_log_likelihood,
            reduction=self.config.reduction,
            # rounding="torch" promises stock torch's bits.
            fused=self.config.rounding != "torch",
        )
        self.selections = select_parameters(model, self.config.scope, self.config.layers)
        for selection in self.selections:
            if selection.param.is_inference():
                raise ValueError(
                    f"TTTTrainer: {selection.name} is an inference tensor, which can never be"
                    " trained. Load the model outside torch.inference_mode()."
                )
        self._engines: dict[str, DenseEngine | FactoredEngine] = {}
        self._graphs: dict[str, LoopGraphs] = {}
        self._planner = Planner(model, self.selections, self.config)

    @property
    def config(self) -> TTTConfig:
        """The settings, for which scope, engines and buffers were made: they stay."""
        return self._config

    @config.setter
    def config(self, config: TTTConfig) -> None:
        raise AttributeError(
            "TTTTrainer: its settings cannot be replaced, since scope, engines and buffers were"
            " made for them. Make another: TTTTrainer(model, dataclasses.replace(trainer.config,"
            " lr=...)); any number may have the same model."
        )

    def begin(self, n_deltas: int = 1, n_tokens: int | None = None) -> Session:
        """Start a session: every delta at zero.

        Args:
            n_deltas: D.
            n_tokens: tokens that a delta sees in a step, for engine="auto" and the memory budget to
                plan with; default 64. With kv="frozen", of a delta's contexts.

        Raises:
            RuntimeError: another session or adaptation holds the model.
            ValueError: the number of deltas does not fit the configuration, the engine cannot adapt
                what is selected, or ``memory_budget`` is too small.
        """
        if n_deltas < 1:
            raise ValueError(f"begin: n_deltas={n_deltas}; it must be at least 1.")
        require_free(self.model)
        work = self._work(n_deltas, n_tokens or 64)
        return self._begin(work, self._planner.choose(work))

    def plan(
        self,
        n_deltas: int,
        n_tokens: int,
        engine: str | None = None,
        in_turn: bool = False,
        n_rows: int = 1,
        padded: bool = False,
        n_labels: int | None = None,
    ) -> policy.Choice:
        """What an engine setting comes to: which one, why, and predicted time and memory.

        Args:
            n_deltas: D.
            n_tokens: tokens of a delta's prompts, the longest where they differ. A step sees all of
                them, or spans with kv="frozen".
            engine: "auto", "factored" or "dense"; default ``config.engine``.
            in_turn: with the dense engine each delta is restored before the next one, as in
                :meth:`adapt_batches`; otherwise it keeps all of them, as :meth:`adapt` does.
            n_rows: prompts of a delta.
            padded: some of the prompts are shorter than others.
            n_labels: tokens of a delta that are predicted, the most where they differ; default all
                but the first of each prompt.
        """
        work = self._work(n_deltas, n_tokens, n_rows=n_rows, padded=padded, n_labels=n_labels)
        return self._planner.choose(replace(work, in_turn=in_turn), engine)

    def _work(self, n_deltas: int, n_tokens: int, **found: Any) -> Workload:
        """See :meth:`Planner.work`; with what this trainer's engines hold and know."""
        factored = self._engines.get("factored")
        held = 0 if factored is None or factored.in_use else factored.nbytes
        own = fused_reduction(self.objective) is not None
        in_head = own and all(engine.head.plain is not False for engine in self._engines.values())
        return self._planner.work(
            n_deltas, n_tokens, **found, held_bytes=held, loss_in_head=in_head
        )

    def _begin(self, work: Workload, choice: policy.Choice, **options: Any) -> Session:
        self._planner.require_budget(work, choice)
        engine = self._engine(choice.engine)
        if engine.together:
            options["capacity"] = work.tokens * self.config.steps
        return Session(
            self.model, engine, self.config, work.deltas, self.objective, choice=choice, **options
        )

    def _engine(self, name: str) -> DenseEngine | FactoredEngine:
        """The engine of a name; made once, so that its buffers live from prompt to prompt."""
        # A detached adaptation keeps the buffers of its engine; the next prompt gets another.
        if name not in self._engines or self._engines[name].in_use:
            kind = FactoredEngine if name == "factored" else DenseEngine
            self._engines[name] = kind(self.model, self.selections, self.config)
            # A graph knows the addresses of one engine's buffers.
            self._graphs[name] = LoopGraphs()
        return self._engines[name]

    def adapt(
        self,
        prompt: Any,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_weights: Tensor | None = None,
        row_weights: Tensor | None = None,
        deltas: str | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        stop: Callable[[StepReport], bool] | None = None,
        progress: bool = False,
    ) -> Adaptation:
        """Take ``config.steps`` gradient steps on a prompt and return the adapted model.

        Args:
            prompt: ids (T,) or (N, T), lists of ids, a tokenizer's output, or text if there is a
                tokenizer.
            labels: (N, T), −100 where there is nothing to predict.
            attention_mask: (N, T), 0 at padding.
            position_ids: (N, T); default counted from the mask.
            token_weights: (N, T) weights of the predicted tokens.
            row_weights: (N,) weights of the rows; default their delta's mean.
            deltas: with several rows, "independent" (each adapts on its own) or "shared" (all train
                one delta).
            on_step: called after every step; waits for the device.
            stop: called after every step for each delta, with the others' losses NaN; a true answer
                ends that delta's adaptation.
            progress: show a bar.

        Returns:
            The adaptation, which holds the model until it is restored or merged; a context manager.

        Raises:
            DivergedError: a loss was not finite.
            ValueError: bad input, or ``memory_budget`` is too small; says what would fit. Nothing
                has changed, as after every other exception.
        """
        batch = prompt_batch(
            self.model,
            self.tokenizer,
            prompt,
            labels=labels,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_weights=token_weights,
            row_weights=row_weights,
            deltas=deltas,
            kv=self.config.kv,
        )
        require_free(self.model)
        n_deltas = int(batch.delta_index.max()) + 1
        n_rows = batch.n_rows // n_deltas
        n_tokens = self._padded_length(batch) * n_rows
        work = self._work(n_deltas, n_tokens, n_rows=n_rows, **self._found(batch))
        begin = partial(self._begin, work, self._planner.choose(work))
        return self._adapt(begin, batch, on_step, stop, progress)

    def adapt_grid(
        self,
        prompt: Any,
        *,
        lr: Sequence[Schedule] | None = None,
        momentum: Sequence[float] | None = None,
        weight_decay: Sequence[float] | None = None,
        max_grad_norm: Sequence[float | None] | None = None,
        labels: Tensor | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        progress: bool = False,
    ) -> Adaptation:
        """Adapt one prompt with every combination of settings at once; each is a delta.

        They share every read of the weights, and a trajectory holds all its earlier steps
        (:meth:`FactoredAdaptation.at`), so a sweep is one call. A combination that diverges keeps
        its last finite weights and is marked in ``adapted.diverged``; the others go on.

        Args:
            prompt: one prompt, as in :meth:`adapt`.
            lr: step sizes or schedules; default the configuration's, as for all others.
            momentum: momenta.
            weight_decay: decay coefficients.
            max_grad_norm: clip thresholds, None for no clipping.
            labels: (1, T), as in :meth:`adapt`.
            on_step: called after every step.
            progress: show a bar.

        Returns:
            The adaptation; ``adapted.configs[d]`` are the settings of delta d, in the order of
            ``itertools.product(lr, momentum, weight_decay, max_grad_norm)``.

        Raises:
            ValueError: bad input, an empty axis, or something that only the dense engine can do.
        """
        axes = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                "max_grad_norm": max_grad_norm}  # fmt: skip
        for name, values in axes.items():
            is_list = isinstance(values, Sequence) and not isinstance(values, str)
            if values is not None and not (is_list and len(values) > 0):
                raise ValueError(
                    f"adapt_grid: {name}={values!r}; give a list of at least one value to try."
                )
        given = {name: values for name, values in axes.items() if values is not None}
        base = replace(self.config, engine="factored")
        configs = [
            replace(base, **dict(zip(given, values, strict=True)))
            for values in itertools.product(*given.values())
        ]
        single = prompt_batch(self.model, self.tokenizer, prompt, labels=labels, kv=self.config.kv)
        n = len(configs)
        batch = replace(single.rows(torch.zeros(n, dtype=torch.int64)), delta_index=torch.arange(n))
        batch = complete_batch(batch, self.model, n)
        require_free(self.model)
        work = self._work(n, self._padded_length(batch), **self._found(batch))
        choice = self._planner.choose(work, "factored")
        begin = partial(self._begin, work, choice, configs=configs, keep_diverged=True)
        adaptation = self._adapt(begin, batch, on_step, None, progress)
        adaptation.configs = configs
        return adaptation

    def adapt_batches(
        self, prompts: Any, *, progress: bool = False, **options: Any
    ) -> Iterator[tuple[list[int], Adaptation]]:
        """Adapt a list of prompts of any length, each on its own, in batches that fit.

            for numbers, adapted in ttt.adapt_batches(prompts, progress=True):
                for n, ids in zip(numbers, adapted.generate(max_new_tokens=64)):
                    answers[n] = ids

        Prompts are taken by length, so that little is padded, and as many at once as
        ``config.max_batch_tokens`` and the memory allow. Each batch is restored before the next.

        Args:
            prompts: a list of texts, of lists of ids or of tensors, as in :meth:`adapt`.
            progress: show a bar of prompts.
            **options: ``on_step`` and ``stop`` of :meth:`adapt`.

        Yields:
            the numbers of the batch's prompts in the list, and their adaptation: delta d is prompt
            ``numbers[d]``.
        """
        rows, extra = as_prompts(prompts, self.tokenizer)
        if extra:
            raise ValueError(
                f"adapt_batches: got {', '.join(extra)} with the prompts; give a list of prompts"
                " alone, without padding."
            )
        # Now, and not when its batch comes after hours of others.
        longest = context_length(self.model) or math.inf
        for n, row in enumerate(rows):
            if not 2 <= row.numel() <= longest:
                raise ValueError(
                    f"adapt_batches: prompt {n} has {row.numel()} tokens; it needs at least two"
                    f" tokens and at most {longest}, the model's context. Leave it out."
                )
        order = sorted(range(len(rows)), key=lambda n: rows[n].numel())
        with tqdm(total=len(rows), disable=not progress, unit="prompt") as bar:
            while order:
                count = self._prompts_at_once([rows[n].numel() for n in order])
                numbers, order = order[:count], order[count:]
                batch = [rows[n] for n in numbers]
                with self.adapt(batch, deltas="independent", **options) as adapted:
                    yield numbers, adapted
                bar.update(count)

    def _prompts_at_once(self, lengths: Sequence[int]) -> int:
        """How many of the first prompts, by length, go into one batch: at least one."""
        limit = self.config.max_batch_tokens
        count = 1
        while count < len(lengths):
            longest = lengths[count]
            if limit is not None and (count + 1) * self.config.tokens_of_step(longest) > limit:
                break
            padded = lengths[0] < longest
            if self.plan(count + 1, longest, padded=padded).deltas_at_once <= count:
                break
            count += 1
        # The dense engine takes one after the other: all that a batch would need is copies.
        choice = self.plan(count, lengths[count - 1], in_turn=True)
        return 1 if choice.engine == "dense" else count

    def _adapt(
        self,
        begin: Callable[[], Session],
        batch: Batch,
        on_step: Callable[[StepReport], None] | None,
        stop: Callable[[StepReport], bool] | None,
        progress: bool,
    ) -> Adaptation:
        """All steps of all deltas of a complete batch."""
        reason = self._graph_obstacle(watched=on_step is not None or stop is not None)
        try:
            with (
                profiling.annotate("adapt", self.selections[0].param.device),
                begin() as session,
                tqdm(
                    total=session.n_deltas * self.config.steps,
                    disable=not progress,
                    unit="step",
                    leave=False,
                ) as bar,
            ):
                graphs = self._graphs[session.engine.name]
                frozen = session.prefill(batch) if self.config.kv == "frozen" else None
                seen = batch if frozen is None else frozen.drawn(self.config, 0)
                parts = [
                    (deltas, rows.padded_to(self._padded_length(rows)))
                    for deltas, rows in session.parts(seen)
                ]
                if reason is None and graphs.take_steps(session, parts):
                    bar.update(bar.total)
                else:
                    for deltas, rows in parts:
                        self._adapt_part(session, deltas, rows, on_step, stop, bar, frozen)
                adaptation = session.end()
            adaptation.cuda_graph = graphs.status if reason is None else one_by_one(reason)
            adaptation.prompt, adaptation.tokenizer = batch, self.tokenizer
            adaptation.go_on_from(frozen)
            adaptation.choice, adaptation.diverged = session.choice, session.diverged
            return adaptation
        except BaseException:
            # Ctrl-C may have come between two lines, while nobody else would have restored.
            self.restore()
            raise

    def _padded_length(self, rows: Batch) -> int:
        """Tokens that rows have in the model, with the padding that was asked for."""
        length, multiple = rows.input_ids.shape[1], self.config.pad_to_multiple_of or 1
        longest = context_length(self.model) or math.inf
        return max(length, min(-(-length // multiple) * multiple, longest))

    def _found(self, rows: Batch) -> dict[str, Any]:
        """What of a complete batch a plan depends on, besides its size."""
        padded = rows.padded or self._padded_length(rows) > rows.input_ids.shape[1]
        # Only where it is asked for: it waits for the device.
        here = rows.device.type == "cpu"
        return {"padded": padded, "n_labels": rows.labels_at_most() if here else None}

    def _graph_obstacle(self, watched: bool) -> str | None:
        """Why steps are not recorded, in words; None where they may be."""
        if self.config.cuda_graph is False:
            return "cuda_graph=False"
        reason = obstacle(self.model, self.config, self._own_objective, watched)
        if reason is not None:
            demand(self.config, reason)
        return reason

    def _adapt_part(
        self,
        session: Session,
        deltas: tuple[int, ...],
        rows: Batch,
        on_step: Callable[[StepReport], None] | None,
        stop: Callable[[StepReport], bool] | None,
        bar: tqdm,
        frozen: FrozenKeys | None,
    ) -> None:
        """All steps of the deltas that go through the model together, on rows or drawn spans."""
        active, parts = list(deltas), [(deltas, rows)]
        for step in range(self.config.steps):
            if frozen is not None:
                drawn = frozen.drawn(self.config, step, active)
                parts = [(deltas, drawn)] if active == [*deltas] else session.parts(drawn)
            # The session counts the steps of all deltas, a user those of the prompt.
            report = replace(session.step_parts(parts), step=step + 1)
            bar.update(len(active))
            if not bar.disable:
                bar.set_postfix(loss=f"{report.losses.nanmean():.4f}")
            if on_step is not None:
                on_step(report)
            ended = [d for d in active if stop is not None and stop(report.of(d))]
            if ended:
                bar.total -= len(ended) * (self.config.steps - step - 1)
                active = [d for d in active if d not in ended]
                if not active:
                    break
                left = torch.isin(rows.delta_index, torch.tensor(active, device=rows.device))
                parts = session.parts(rows.rows(left.nonzero().flatten()))

    def load(self, path: str | os.PathLike[str]) -> Adaptation:
        """An adaptation that was saved with :meth:`FactoredAdaptation.save`, attached.

        Raises:
            RuntimeError: the model is held.
            ValueError: the file is of another model's weights; names what differs.
        """
        return Adaptation.load(path, self.model, objective=self.objective, tokenizer=self.tokenizer)

    def restore(self) -> None:
        """Restore the model if a session or an adaptation holds it; otherwise do nothing."""
        active = holder(self.model)
        if isinstance(active, Session):
            active.abort()
        elif active is not None:
            active.restore()
