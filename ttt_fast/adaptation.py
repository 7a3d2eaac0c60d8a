"""An adapted model: generate with it, look at what happened, have the weights back."""

from __future__ import annotations

import copy as copying
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttt_fast.batch import Batch, complete_batch, forward_arguments, pad_rows
from ttt_fast.config import TTTConfig
from ttt_fast.engines.deltas import Trajectory
from ttt_fast.engines.policy import Choice
from ttt_fast.frozen_keys import FrozenKeys
from ttt_fast.interrupt import uninterrupted
from ttt_fast.keys_values import KeptPrompts
from ttt_fast.model_state import evaluating, holder, release
from ttt_fast.objective import Objective
from ttt_fast.profiling import Phases
from ttt_fast.prompts import as_prompts
from ttt_fast.session import Engine, evaluate, parts_of, unadapted_keys

if TYPE_CHECKING:
    from ttt_fast.factored_adaptation import FactoredAdaptation
    from ttt_fast.session import Session

# What takes the gradients of every step, which only the factored engine keeps.
_NEEDS_FACTORS = (
    "rewind", "at", "at_step", "attach", "detach", "attached", "save", "to_lora", "delta_norm",
    "grad_cosine",
)  # fmt: skip


class Adaptation:
    """The result of a session. While it is active, the model has the adapted weights.

    This is what the dense engine gives: the weights themselves have changed, and with several
    deltas ``generate`` and ``loss`` swap each one's weights in for its own rows; between calls the
    model has the original weights. The factored engine gives a
    :class:`ttt_fast.factored_adaptation.FactoredAdaptation`, which can do more: earlier steps,
    detaching, files, LoRA adapters, norms and cosines.

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
        choice: why this engine, and what was predicted; None for a loaded adaptation.
        configs: the settings of each delta of ``adapt_grid``; None elsewhere.
        diverged: (D,) bool, deltas that kept their last finite weights; only ``adapt_grid`` goes on
            after one.
        prompt: the batch that ``adapt`` trained on, None for a session of the caller's own.
        tokenizer: the trainer's, to pass text to ``generate`` and ``loss``; likewise.
        cuda_graph: whether the steps of ``adapt`` were replayed from a CUDA graph, and if not why;
            empty for a session of the caller's own.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        config: TTTConfig,
        engine: Engine,
        objective: Objective,
        phases: Phases,
        losses: list[Tensor],
        grad_norms: list[Tensor],
    ) -> None:
        self.model = model
        self.config = config
        self.n_deltas = len(losses)
        self.choice: Choice | None = None
        self.configs: list[TTTConfig] | None = None
        self.diverged = torch.zeros(self.n_deltas, dtype=torch.bool)
        self.prompt: Batch | None = None
        self.tokenizer: Any = None
        self.cuda_graph = ""
        self._engine = engine
        self._phases = phases
        self._objective = objective
        self._arguments = forward_arguments(model)
        self._kept = KeptPrompts(model, engine.selections)
        self.losses = _ragged(losses)
        self.grad_norms = _ragged(grad_norms)
        self.steps = torch.tensor([row.numel() for row in losses])
        self.update_landed = torch.tensor([engine.landed(d) for d in range(self.n_deltas)])
        self.nbytes = engine.nbytes
        self._over: str | None = None
        self._can_unmerge = False

    @staticmethod
    def of(session: Session) -> Adaptation:
        """What a session has come to, as its engine keeps it."""
        histories = [session.history.of(delta) for delta in range(session.n_deltas)]
        fields = {
            "model": session.model,
            "config": session.config,
            "engine": session.engine,
            "objective": session.objective,
            "phases": session.phases,
            "losses": [losses for losses, _ in histories],
            "grad_norms": [norms for _, norms in histories],
        }
        if session.engine.name == "dense":
            return Adaptation(**fields)
        from ttt_fast.factored_adaptation import FactoredAdaptation

        for track in session.engine.tracks:
            track.coefficients = Trajectory.of(track.coefficients)
        # The step of the session with which each step of a delta ended.
        ends = [session.history.steps(delta) for delta in range(session.n_deltas)]
        return FactoredAdaptation(**fields, ends=ends)

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        objective: Objective | None = None,
        tokenizer: Any = None,
    ) -> FactoredAdaptation:
        """Attach an adaptation that was saved (:meth:`FactoredAdaptation.save`) to its model.

        Args:
            path: the file.
            model: with the very weights that it was made for; they may be on another device.
            objective: of :meth:`loss`, where it was not the usual one.
            tokenizer: to pass text.

        Returns:
            The adaptation, attached, as it was when it was saved.

        Raises:
            RuntimeError: a session or an adaptation holds the model.
            ValueError: not such a file, or the model has other weights; names the first.
        """
        from ttt_fast.factored_adaptation import read_adaptation

        return read_adaptation(path, model, objective, tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name in _NEEDS_FACTORS:
            instead = "; state_dict() has the adapted weights" if name == "save" else ""
            raise AttributeError(
                f"{name}: the dense engine does not keep the gradients of the steps that this needs"
                f"{instead}. Adapt with engine='factored'."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ------------------------------------------------------------------ use

    @torch.no_grad()
    def generate(self, input_ids: Any = None, **kwargs: Any) -> Tensor:
        """Hugging Face ``generate`` with the adapted weights.

        Args:
            input_ids: (N, T) ids, with ``attention_mask`` among the keywords if they are padded;
                default the adapted prompts, each continued with its own delta. With several deltas,
                row n is delta n's. With kv="frozen" the adapted prompts' keys and values are those
                of the unadapted weights, but for the last token; of ids that are given, those of
                the adapted ones.
            **kwargs: passed on.

        Returns:
            (rows, tokens) ids as Hugging Face returns them. What is kept from call to call:
            :attr:`reused_keys_values`.

        Raises:
            RuntimeError: the adaptation is over.
            ValueError: nothing to continue, or rows that belong to no delta.
        """
        self._require_active()
        if input_ids is None:
            ids, mask = self._prompt_rows()
            kept = self._kept
            if self.config.kv == "frozen" and kept.frozen is None:
                # After a file was read, or a detached adaptation gave up what it held.
                kept.frozen = unadapted_keys(self.model, self._engine, self.prompt)
        else:
            ids, mask = self._given_rows(input_ids, kwargs)
            kept, self._kept.reused = None, False
        with uninterrupted() as held, evaluating(self.model), self._phases("generate"):
            if self.n_deltas == 1 or self._engine.together:
                with held.released():
                    return self._generate(ids, mask, kwargs, kept)
            return self._generate_each(ids, mask, kwargs, held, kept)

    def loss(self, input_ids: Any = None, labels: Tensor | None = None) -> Tensor:
        """Loss of every delta on ids, default on its own prompt, without a gradient: (D,).

        All of it is computed with the adapted weights, with kv="frozen", too.
        """
        self._require_active()
        batch = self.prompt if input_ids is None else self._batch_of(input_ids, labels)
        if batch is None:
            raise ValueError("loss: this adaptation has no prompt of its own; pass input_ids.")
        losses = torch.full((self.n_deltas,), torch.nan, dtype=self.losses.dtype)
        for deltas, rows in parts_of(batch, self._engine, self.config):
            with self._engine.showing(deltas):
                losses[list(deltas)] = evaluate(
                    self.model, rows, self._objective, self._arguments, len(deltas), self._engine
                ).to(losses)
        return losses

    @contextmanager
    def weights_of(self, delta: int) -> Iterator[nn.Module]:
        """The model with one delta's weights. With a single delta it has them all the time."""
        self._require_active()
        delta = self._one_delta("weights_of", delta)
        if self.n_deltas == 1:
            yield self.model
            return
        with uninterrupted() as held, self._engine.showing([delta]), held.released():
            yield self.model

    def state_dict(self, delta: int = 0) -> dict[str, Tensor]:
        """A copy of the model's ``state_dict`` with a delta's adapted weights."""
        with self.weights_of(delta):
            return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    # ------------------------------------------------------------------ the end

    def restore(self) -> None:
        """Give the model its original weights back, bit for bit. Doing it again changes nothing.

        After ``merge(snapshot=True)`` this undoes the merge; other merges are for good.
        """
        if self._over is not None and not self._can_unmerge:
            return
        with uninterrupted():
            with self._phases("restore"):
                self._engine.restore()
            self._finish("restored")

    def merge(
        self,
        delta: int | None = None,
        *,
        rounding: str = "nearest",
        seed: int = 0,
        copy: bool = False,
        snapshot: bool = False,
    ) -> nn.Module:
        """Put a delta's adapted weights into the model, or into a copy of it.

            adapted.merge()                       # for good; the adaptation is over
            adapted.merge(snapshot=True)          # until restore(), or the end of the `with` block
            other = adapted.merge(copy=True)      # this model and the adaptation stay as they are

        To stack merges and go back over several, take a :class:`ttt_fast.Snapshot` of the model
        before the first.

        Args:
            delta: which one; may be left out if there is only one.
            rounding: "nearest" or "stochastic", how weights are rounded to the model's type. The
                dense engine has rounded them already, as its configuration says.
            seed: of stochastic rounding.
            copy: leave the model alone and give a new one, held by nobody.
            snapshot: keep the original weights, so that :meth:`restore` brings them back bit for
                bit; until then nothing else can adapt the model.

        Returns:
            The model that has the weights.

        Raises:
            RuntimeError: the adaptation is over.
            ValueError: no such delta, an unknown rounding, or copy with snapshot.
        """
        delta = self._one_delta("merge", delta)
        if copy and snapshot:
            raise ValueError(
                "merge: copy=True leaves the model alone, so there is nothing for snapshot=True to"
                " keep; pass one of them."
            )
        return self._merge(delta, rounding, seed, copy, snapshot)

    def _merge(self, delta: int, rounding: str, seed: int, copy: bool, snapshot: bool) -> nn.Module:
        """:meth:`merge` of what was checked; here of weights that the model holds, or will."""
        if rounding != "nearest":
            raise ValueError(
                f"merge: rounding={rounding!r}, but the dense engine has rounded the weights at"
                " every step. Pass rounding to TTTConfig, or adapt with engine='factored'."
            )
        if copy:
            with self.weights_of(delta) as model:
                return copying.deepcopy(model)
        with uninterrupted():
            self._engine.make_resident(delta)
            if snapshot:
                # The engine's own snapshot is the way back, and its originals may be aside: with
                # the delta resident, restore() brings them back.
                self._over, self._can_unmerge = "merged", True
            else:
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
    def reused_keys_values(self) -> bool | None:
        """Whether the last ``generate`` went on from keys and values of an earlier one.

        Those of the own prompts are kept where no adapted parameter can change them: a head that is
        not the embedding, the final norm, and in the last layer what comes after them. Everything
        else is computed again with the adapted weights, but with kv="frozen", where they are those
        of the unadapted weights. None before the first ``generate``.
        """
        return self._kept.reused

    @property
    def timings(self) -> dict[str, float]:
        """Phase -> milliseconds: snapshot, forward, backward, update, generate, restore.

        Where the steps are in a CUDA graph: record, replay.
        """
        return self._phases.ms

    @property
    def peak_bytes(self) -> dict[str, int | None]:
        """Phase -> peak bytes above the model at rest, None where the system does not tell."""
        return dict(self._phases.peak_bytes)

    def report(self) -> str:
        """One screen: engine, losses, how much of the update landed, time and memory by phase."""
        lines = [f"engine {self._engine_line()}"]
        if self.choice is not None:
            lines.append(f"chosen {self.choice.reason}")
        if self.cuda_graph and self._phases.device.type != "cpu":
            lines.append(self.cuda_graph)
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
        if self.reused_keys_values is not None:
            how = "reused" if self.reused_keys_values else "computed with the adapted weights"
            if self.reused_keys_values and self.config.kv == "frozen":
                how = "those of the unadapted weights (kv='frozen')"
            lines.append(f"keys and values of the last generation's prompt: {how}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        state = self._over or "active"
        return f"<Adaptation of {self.n_deltas} delta(s), steps {self.steps.tolist()}, {state}>"

    # ------------------------------------------------------------------ details

    def go_on_from(self, frozen: FrozenKeys | None) -> None:
        """Let :meth:`generate` go on from these keys and values of the adapted prompts."""
        self._kept.frozen = frozen

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

    def _generate(
        self,
        ids: Tensor,
        mask: Tensor,
        kwargs: dict[str, Any],
        kept: KeptPrompts | None,
        delta: int | None = None,
    ) -> Tensor:
        """Generate with what the model computes now; ``kept`` where rows are the own prompts."""
        if kept is not None:
            kwargs = kept.options(delta, ids, mask, self._arguments, kwargs)
        return self.model.generate(ids, attention_mask=mask, **kwargs)

    def _generate_each(
        self,
        ids: Tensor,
        mask: Tensor,
        kwargs: dict[str, Any],
        held: uninterrupted,
        kept: KeptPrompts | None,
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
                output = self._generate(row, row_mask, kwargs, kept, delta)
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

    def _one_delta(self, name: str, delta: int | None) -> int:
        """Check the number of a delta; None is the only one."""
        self._require_not_over()
        if delta is None and self.n_deltas > 1:
            raise ValueError(
                f"{name}: there are {self.n_deltas} deltas; say which, {name}(delta=...)."
            )
        if not 0 <= (delta or 0) < self.n_deltas:
            raise ValueError(f"{name}: delta {delta} of {self.n_deltas}; they count from 0.")
        return delta or 0

    def _engine_line(self) -> str:
        return "dense: weights in place, " + self._engine.snapshot.describe()

    def _require_not_over(self) -> None:
        if self._over is not None:
            undo = "restore() undoes it" if self._can_unmerge else "call adapt again"
            raise RuntimeError(f"this adaptation was {self._over}; its deltas are gone: {undo}.")

    def _require_active(self) -> None:
        self._require_not_over()

    def _finish(self, how: str) -> None:
        self._over, self._can_unmerge = how, False
        self._kept.forget()
        # One that is detached may end while another holds the model.
        if holder(self.model) is self:
            release(self.model)


def _ragged(rows: list[Tensor]) -> Tensor:
    """Stack rows of different lengths, NaN behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)
