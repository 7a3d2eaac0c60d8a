"""An adapted model: generate with it, look at what happened, have the weights back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttt_fast.batch import Batch, as_prompts, complete_batch, pad_rows
from ttt_fast.session import evaluate, evaluating, release, uninterrupted

if TYPE_CHECKING:
    from ttt_fast.session import Session


class Adaptation:
    """The result of a session. While it is active, the model has the adapted weights.

    With several deltas ``generate`` and ``loss`` swap each one's weights in for its own rows;
    between calls the model has the original weights.

    Attributes:
        model: the model.
        n_deltas: number of deltas D.
        losses: (D, K) float32 (float64 for a float64 model), loss before each update; NaN after a
            delta's last step.
        grad_norms: (D, K) likewise, global gradient norm before clipping.
        steps: (D,) steps that each delta took.
        update_landed: (D,) share of the intended updates that reached the weights the forward
            reads: Σ⟨W' − W, Δ⟩ / Σ‖Δ‖². Below |Δx|/|y| of about 7e-4, bfloat16 rounding of the
            activations hides a delta whatever this says.
        nbytes: bytes of snapshot and optimizer state.
        prompt: the batch that ``adapt`` trained on, None for a session of the caller's own.
        tokenizer: the trainer's, to pass text to ``generate`` and ``loss``; likewise.
    """

    def __init__(self, session: Session) -> None:
        self.model: nn.Module = session.model
        self.config = session.config
        self.n_deltas = session.n_deltas
        self.prompt: Batch | None = None
        self.tokenizer: Any = None
        self._engine = session.engine
        self._phases = session.phases
        self._objective = session.objective
        self._arguments = session._arguments
        histories = [session.history(delta) for delta in range(self.n_deltas)]
        self.losses = _ragged([losses for losses, _ in histories])
        self.grad_norms = _ragged([norms for _, norms in histories])
        self.steps = torch.tensor([losses.numel() for losses, _ in histories])
        self.update_landed = torch.tensor(
            [self._engine.landed(delta) for delta in range(self.n_deltas)]
        )
        self.nbytes = self._engine.nbytes
        self._over: str | None = None
        if self.n_deltas > 1:
            self._engine.set_aside()
            self._engine.restore()

    # ------------------------------------------------------------------ use

    @torch.no_grad()
    def generate(self, input_ids: Any = None, **kwargs: Any) -> Tensor:
        """Hugging Face ``generate`` with the adapted weights.

        Args:
            input_ids: (N, T) ids, with ``attention_mask`` among the keywords if they are padded;
                default the adapted prompts, each continued with its own delta. With several deltas,
                row n is delta n's.
            **kwargs: passed on.

        Returns:
            (rows, tokens) ids as Hugging Face returns them.

        Raises:
            RuntimeError: the adaptation is over.
            ValueError: nothing to continue, or rows that belong to no delta.
        """
        self._require_active()
        if input_ids is None:
            ids, mask = self._prompt_rows()
        else:
            ids, mask = self._given_rows(input_ids, kwargs)
        with uninterrupted() as held, evaluating(self.model), self._phases("generate"):
            if self.n_deltas == 1:
                with held.released():
                    return self.model.generate(ids, attention_mask=mask, **kwargs)
            return self._generate_each(ids, mask, kwargs, held)

    def loss(self, input_ids: Any = None, labels: Tensor | None = None) -> Tensor:
        """Loss of every delta on ids, default on its own prompt, without a gradient: (D,)."""
        self._require_active()
        batch = self.prompt if input_ids is None else self._batch_of(input_ids, labels)
        if batch is None:
            raise ValueError("loss: this adaptation has no prompt of its own; pass input_ids.")
        losses = torch.full((self.n_deltas,), torch.nan, dtype=self.losses.dtype)
        for delta, rows in batch.by_delta():
            with self.weights_of(delta):
                losses[delta] = evaluate(self.model, rows, self._objective, self._arguments)
        return losses

    @contextmanager
    def weights_of(self, delta: int) -> Iterator[nn.Module]:
        """The model with one delta's weights. With a single delta it has them all the time."""
        self._require_active()
        if not 0 <= delta < self.n_deltas:
            raise ValueError(f"weights_of: delta {delta} of {self.n_deltas}; they count from 0.")
        if self.n_deltas == 1:
            yield self.model
            return
        outer = self._engine.resident
        try:
            self._engine.make_resident(delta)
            yield self.model
        finally:
            with uninterrupted():
                if outer is None:
                    self._engine.restore()
                else:
                    self._engine.make_resident(outer)

    def state_dict(self, delta: int = 0) -> dict[str, Tensor]:
        """A copy of the model's ``state_dict`` with a delta's adapted weights."""
        with self.weights_of(delta):
            return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    # ------------------------------------------------------------------ the end

    def restore(self) -> None:
        """Give the model its original weights back, bit for bit. Doing it again changes nothing."""
        if self._over is not None:
            return
        with uninterrupted():
            with self._phases("restore"):
                self._engine.restore()
            self._finish("restored")

    def merge(self, delta: int | None = None) -> nn.Module:
        """Keep the adapted weights in the model for good.

        Args:
            delta: which one; may be left out if there is only one.

        Returns:
            The model.
        """
        self._require_active()
        if delta is None and self.n_deltas > 1:
            raise ValueError(f"merge: there are {self.n_deltas} deltas; say which, merge(delta).")
        if not 0 <= (delta or 0) < self.n_deltas:
            raise ValueError(f"merge: delta {delta} of {self.n_deltas}; they count from 0.")
        with uninterrupted():
            self._engine.make_resident(delta or 0)
            self._engine.merge()
            self._finish("merged")
        return self.model

    def __enter__(self) -> Adaptation:
        self._require_active()
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    # ------------------------------------------------------------------ what happened

    @property
    def timings(self) -> dict[str, float]:
        """Phase -> milliseconds: snapshot, forward, backward, update, generate, restore."""
        return self._phases.ms

    @property
    def peak_bytes(self) -> dict[str, int | None]:
        """Phase -> peak bytes above the model at rest, None where the system does not tell."""
        return dict(self._phases.peak_bytes)

    def report(self) -> str:
        """One screen: engine, losses, how much of the update landed, time and memory by phase."""
        lines = ["engine dense: weights in place, " + self._engine.snapshot.describe()]
        for delta in range(self.n_deltas):
            steps = int(self.steps[delta])
            name = f"delta {delta}: " if self.n_deltas > 1 else ""
            if steps == 0:
                lines.append(f"{name}0 steps")
                continue
            lines.append(
                f"{name}{steps} steps, loss {self.losses[delta, 0]:.4f} ->"
                f" {self.losses[delta, steps - 1]:.4f} (before the last update), gradient norm"
                f" {self.grad_norms[delta, 0]:.3g} -> {self.grad_norms[delta, steps - 1]:.3g},"
                f" update_landed {self.update_landed[delta]:.4f}"
            )
        for phase, ms in self.timings.items():
            peak = self.peak_bytes.get(phase)
            memory = "" if peak is None else f"   peak {peak / 2**20:8.1f} MiB"
            lines.append(f"{phase:>10} {ms:10.1f} ms{memory}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        state = self._over or "active"
        return f"<Adaptation of {self.n_deltas} delta(s), steps {self.steps.tolist()}, {state}>"

    # ------------------------------------------------------------------ details

    def _prompt_rows(self) -> tuple[Tensor, Tensor]:
        if self.prompt is None:
            raise ValueError(
                "generate: this adaptation came from a session, so there is no prompt to continue;"
                " pass input_ids."
            )
        # Generation continues at the right end, so padding has to be on the left.
        mask = self.prompt.attention_mask
        rows = [ids[kept != 0] for ids, kept in zip(self.prompt.input_ids, mask, strict=True)]
        return pad_rows(rows, self._pad_token())

    def _given_rows(self, input_ids: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        rows, extra = as_prompts(input_ids, self.tokenizer)
        device = self.model.get_input_embeddings().weight.device
        mask = kwargs.pop("attention_mask", None)
        mask = extra.get("attention_mask") if mask is None else mask
        ids, padding = pad_rows([row.to(device) for row in rows], self._pad_token())
        return ids, padding if mask is None else mask.to(device)

    def _generate_each(
        self, ids: Tensor, mask: Tensor, kwargs: dict[str, Any], held: uninterrupted
    ) -> Tensor:
        if ids.shape[0] != self.n_deltas:
            raise ValueError(
                f"generate: got {ids.shape[0]} rows for {self.n_deltas} deltas; row n is continued"
                " with delta n. Give one row for each, or use `with adapted.weights_of(delta) as"
                " model`."
            )
        outputs = []
        for delta in range(self.n_deltas):
            row, row_mask = ids[delta : delta + 1], mask[delta : delta + 1]
            with self.weights_of(delta), held.released():
                output = self.model.generate(row, attention_mask=row_mask, **kwargs)
            if not isinstance(output, Tensor):
                raise ValueError(
                    "generate: return_dict_in_generate cannot be combined over several deltas; use "
                    "`with adapted.weights_of(delta) as model: model.generate(...)`."
                )
            outputs += list(output)
        return pad_rows(outputs, self._pad_token(), side="right")[0]

    def _batch_of(self, input_ids: Any, labels: Tensor | None) -> Batch:
        rows, extra = as_prompts(input_ids, self.tokenizer)
        ids, padding = pad_rows(rows, 0, side="right")
        mask = extra.get("attention_mask", padding)
        one_each = self.n_deltas > 1 and len(rows) == self.n_deltas
        if self.n_deltas > 1 and not one_each:
            raise ValueError(
                f"loss: got {len(rows)} rows for {self.n_deltas} deltas; give one for each."
            )
        index = torch.arange(len(rows)) if one_each else None
        batch = Batch(ids, labels=labels, attention_mask=mask, delta_index=index)
        return complete_batch(batch, self.model, self.n_deltas)

    def _pad_token(self) -> int:
        config = getattr(self.model, "generation_config", None) or self.model.config
        pad = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
        return pad[0] if isinstance(pad, list) else (pad or 0)

    def _require_active(self) -> None:
        if self._over is not None:
            raise RuntimeError(
                f"this adaptation was {self._over}; its deltas are gone. Call adapt again."
            )

    def _finish(self, how: str) -> None:
        self._over = how
        release(self.model)


def _ragged(rows: list[Tensor]) -> Tensor:
    """Stack rows of different lengths, NaN behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)
