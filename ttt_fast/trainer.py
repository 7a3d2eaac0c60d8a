"""The trainer: adapt a model to a prompt, use it, have the original weights back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ttt_fast.adaptation import Adaptation
from ttt_fast.batch import Batch, as_prompts, complete_batch, pad_rows
from ttt_fast.config import TTTConfig
from ttt_fast.engines.dense import DenseEngine
from ttt_fast.objective import Objective, negative_log_likelihood
from ttt_fast.scope import select_parameters
from ttt_fast.session import Session, StepReport, holder, require_free


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
        self.config = TTTConfig() if config is None else config
        self.tokenizer = tokenizer
        self.objective = objective or partial(
            negative_log_likelihood, reduction=self.config.reduction
        )
        self.selections = select_parameters(model, self.config.scope, self.config.layers)
        for selection in self.selections:
            if selection.param.is_inference():
                raise ValueError(
                    f"TTTTrainer: {selection.name} is an inference tensor, which can never be"
                    " trained. Load the model outside torch.inference_mode()."
                )
        self._engine: DenseEngine | None = None

    def begin(self, n_deltas: int = 1) -> Session:
        """Start a session: take the snapshot, set every delta to zero.

        Raises:
            RuntimeError: another session or adaptation holds the model.
            ValueError: the number of deltas does not fit the configuration.
        """
        if n_deltas < 1:
            raise ValueError(f"begin: n_deltas={n_deltas}; it must be at least 1.")
        require_free(self.model)
        if self._engine is None:
            self._engine = DenseEngine(self.model, self.selections, self.config)
        return Session(self.model, self._engine, self.config, n_deltas, self.objective)

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
            stop: called after every step; a true answer ends that delta's adaptation.
            progress: show a bar.

        Returns:
            The adaptation, which holds the model until it is restored or merged; a context manager.

        Raises:
            DivergedError: a loss was not finite.
            ValueError: bad input. Nothing has changed, as after every other exception.
        """
        batch = self._batch(
            prompt, labels, attention_mask, position_ids, token_weights, row_weights, deltas
        )
        parts = batch.by_delta()
        require_free(self.model)
        try:
            with (
                self.begin(len(parts)) as session,
                tqdm(
                    total=len(parts) * self.config.steps,
                    disable=not progress,
                    unit="step",
                    leave=False,
                ) as bar,
            ):
                for part in parts:
                    self._adapt_part(session, part, on_step, stop, bar)
                adaptation = session.end()
            adaptation.prompt, adaptation.tokenizer = batch, self.tokenizer
            return adaptation
        except BaseException:
            # Ctrl-C may have come between two lines, while nobody else would have restored.
            self.restore()
            raise

    def _adapt_part(
        self,
        session: Session,
        part: tuple[int, Batch],
        on_step: Callable[[StepReport], None] | None,
        stop: Callable[[StepReport], bool] | None,
        bar: tqdm,
    ) -> None:
        """All steps of one delta on its rows."""
        for step in range(self.config.steps):
            # The session counts the steps of all deltas, a user those of the prompt.
            report = replace(session.step_parts([part]), step=step + 1)
            bar.update()
            if not bar.disable:
                bar.set_postfix(loss=f"{report.losses.nan_to_num().sum():.4f}")
            if on_step is not None:
                on_step(report)
            if stop is not None and stop(report):
                bar.total -= self.config.steps - step - 1
                break

    def restore(self) -> None:
        """Restore the model if a session or an adaptation holds it; otherwise do nothing."""
        active = holder(self.model)
        if isinstance(active, Session):
            active.abort()
        elif active is not None:
            active.restore()

    def _batch(
        self,
        prompt: Any,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        token_weights: Tensor | None,
        row_weights: Tensor | None,
        deltas: str | None,
    ) -> Batch:
        """Check everything before anything is touched."""
        if deltas not in (None, "independent", "shared"):
            raise ValueError(
                f"adapt: deltas={deltas!r} is unknown; use 'independent' (each prompt adapts on its"
                " own) or 'shared' (all train one delta)."
            )
        rows, extra = as_prompts(prompt, self.tokenizer)
        if len(rows) > 1 and deltas is None:
            raise ValueError(
                f"adapt: got {len(rows)} rows; say deltas='independent' (each adapts on its own) or"
                " deltas='shared' (all train one delta)."
            )
        if not rows or any(row.numel() == 0 for row in rows):
            raise ValueError(
                "adapt: the prompt is empty, so there is nothing to learn from. Give at least two"
                " tokens."
            )
        # On the right, where causal attention never looks at it from a token.
        ids, padding = pad_rows(rows, pad_value=0, side="right")
        ragged = bool((padding == 0).any())
        given = {"labels": labels, "attention_mask": attention_mask, "position_ids": position_ids,
                 "token_weights": token_weights}  # fmt: skip
        given = {k: extra.get(k) if v is None else v for k, v in given.items()}
        for name, tensor in given.items():
            if tensor is not None and ragged:
                raise ValueError(
                    f"adapt: {name} cannot go with prompts of different lengths. Pad them and give"
                    f" an attention_mask, or drop {name}."
                )
            if isinstance(tensor, Tensor) and tensor.dim() == 1:
                given[name] = tensor[None]
        if ragged:
            given["attention_mask"] = padding
        independent = deltas == "independent"
        batch = Batch(
            input_ids=ids,
            row_weights=row_weights,
            delta_index=torch.arange(len(rows)) if independent else None,
            **given,
        )
        return complete_batch(batch, self.model, len(rows) if independent else 1)
