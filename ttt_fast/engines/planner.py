"""What a trainer's settings come to on prompts of a size: the work, the engine, what must fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ttt_fast import calibration
from ttt_fast.config import TTTConfig
from ttt_fast.engines import policy
from ttt_fast.engines.budget import refusal
from ttt_fast.engines.work import Workload
from ttt_fast.scope import select_parameters
from ttt_fast.selection import Selection


class Planner:
    """Plans for one model and its settings, which is read once.

    Args:
        model: the model.
        selections: what adapts.
        config: settings.
    """

    def __init__(self, model: nn.Module, selections: Sequence[Selection], config: TTTConfig):
        self._model = model
        self._selections = selections
        self._config = config
        self._one_token: Workload | None = None

    def work(
        self,
        n_deltas: int,
        n_tokens: int,
        *,
        n_rows: int = 1,
        padded: bool = False,
        n_labels: int | None = None,
        held_bytes: int = 0,
        loss_in_head: bool = True,
    ) -> Workload:
        """The work on prompts of a size, with the memory that is free now.

        Args:
            n_deltas: D.
            n_tokens: tokens of a delta's prompts, the longest where they differ.
            n_rows: prompts of a delta.
            padded: some of the prompts are shorter than others.
            n_labels: tokens of a delta that are predicted, the most where they differ; default all
                but the first of each prompt.
            held_bytes: of buffers that the factored engine fills anew.
            loss_in_head: nobody needs logits, as far as the trainer knows.
        """
        if self._one_token is None:
            self._one_token = policy.workload(self._model, self._selections, self._config, 1, 1)
        device = self._selections[0].param.device
        available = self._config.memory_budget
        if available is None:
            available = policy.free_bytes(device)
        else:
            held_bytes = 0  # a budget is for these buffers, too
        together = 1 if n_rows > 1 or self._config.pad_to_multiple_of else 2
        # On other devices all tokens have logits, and so do those of a span.
        all_count = device.type != "cpu" or self._config.kv == "frozen"
        most = n_tokens - n_rows if n_labels is None else n_labels
        work = replace(
            self._one_token,
            deltas=n_deltas,
            available_bytes=available,
            held_bytes=held_bytes,
            padded_from=together if padded else 0,
            n_labels=None if all_count else max(1, most),
        )
        if not loss_in_head:
            work = replace(work, loss_in_head=False)
        return policy.on_prompts(work, self._config, n_tokens, n_rows)

    def choose(self, work: Workload, engine: str | None = None) -> policy.Choice:
        """What an engine setting, default ``config.engine``, comes to."""
        param = self._selections[0].param
        engine = engine or self._config.engine
        if engine == "auto" and torch.is_autocast_enabled(param.device.type):
            engine = "dense"  # factors are in the dtype of the weights
        return policy.choose(work, calibration.machine(param.dtype, param.device), engine)

    def require_budget(self, work: Workload, choice: policy.Choice) -> None:
        """Refuse what would not fit the memory that the user has set.

        Raises:
            ValueError: it does not; says what would.
        """
        budget = self._config.memory_budget
        if budget is None:
            return
        reason = refusal(work, choice, budget, partial(self._scoped, work))
        if reason is not None:
            raise ValueError(f"adapt: {reason} Nothing has changed.")

    def _scoped(self, work: Workload, scope: str) -> Workload | None:
        """The work with another scope, None if the model has nothing by that name."""
        config = replace(self._config, scope=scope)
        try:
            selections = select_parameters(self._model, scope, config.layers)
        except ValueError:
            return None
        smaller = policy.workload(self._model, selections, config, 1, 1)
        return replace(
            work,
            layers=smaller.layers,
            dtype=smaller.dtype,
            blocks=smaller.blocks,
            obstacle=smaller.obstacle,
        )
