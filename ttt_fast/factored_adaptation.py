"""What the factored engine leaves: every step's gradient, beside weights that nobody wrote to."""

from __future__ import annotations

import copy as copying
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttt_fast import adaptation_file
from ttt_fast.adaptation import Adaptation
from ttt_fast.engines import deltas
from ttt_fast.engines.inner_products import InnerProducts
from ttt_fast.interrupt import uninterrupted
from ttt_fast.lora import LoraAdapter, lora_adapter
from ttt_fast.model_state import hold, holder, release, require_free
from ttt_fast.objective import Objective, negative_log_likelihood
from ttt_fast.profiling import Phases
from ttt_fast.snapshot import Snapshot


class FactoredAdaptation(Adaptation):
    """An :class:`Adaptation` that keeps the gradients of its steps as factors.

        adapted = ttt.adapt(prompt)
        for k in (0, 5, 10, 20):                      # one trajectory, looked at on the way
            with adapted.at(k):
                print(k, adapted.loss(question))
        adapted.detach()                              # the model is free; the deltas are kept
        other = ttt.adapt(another_prompt)
        other.restore()
        adapted.attach()                              # and used again
        adapted.save("prompt.safetensors")

    The model's own weights, and so ``model.state_dict()``, are the original ones all the time.
    What follows speaks of the steps of each delta, counted as in ``losses``: ``rewind(k)`` is the
    state whose loss is ``losses[:, k]``.

    Attributes:
        at_step: (D,) number of steps after which each delta is used; ``steps`` unless rewound.
        nbytes: bytes of the factors.
        update_landed: 1 by definition.
    """

    def __init__(self, *, ends: list[list[int]], **fields: Any) -> None:
        super().__init__(**fields)
        # Entry k of a delta: the steps of the session that were over after its own first k.
        self._ends = [[0, *each] for each in ends]
        # Numbers of the steps of the session in which each delta took part, from 0.
        session_steps = [torch.tensor(each, dtype=torch.int64) - 1 for each in ends]
        engine = self._engine
        self._products = InnerProducts(
            engine.factors, engine.tracks, [each.to(engine.device) for each in session_steps]
        )
        self._attached = True
        self._shown = slice(0, self.n_deltas)
        self._base: adaptation_file.Fingerprint = {}
        self._unmerge: Snapshot | None = None
        self._line = self._describe()
        self._go_to(self.steps.tolist())

    # ------------------------------------------------------------------ earlier steps

    def rewind(self, step: int | Sequence[int] | Tensor) -> None:
        """Use the deltas as they were after another number of steps, without computing anything.

        It goes forward as well: rewind(config.steps) is the end again.

        Args:
            step: number of steps k, for all deltas (one that has taken fewer stays at its last); or
                one for each delta, (D,), for example ``adapted.losses.argmin(1)``.

        Raises:
            RuntimeError: the adaptation is over.
            ValueError: there is no such step.
        """
        self._require_not_over()
        self._go_to(self._own_steps("rewind", step))

    @contextmanager
    def at(self, step: int | Sequence[int] | Tensor) -> Iterator[nn.Module]:
        """The model as it was after some steps; afterwards where it stood. As :meth:`rewind`."""
        self._require_active()
        steps, found = self._own_steps("at", step), self.at_step.tolist()
        with uninterrupted() as held:
            try:
                self._go_to(steps)
                with held.released():
                    yield self.model
            finally:
                if self._over is None:
                    self._go_to(found)

    def _own_steps(self, name: str, step: int | Sequence[int] | Tensor) -> list[int]:
        most = self.steps.tolist()
        given = torch.as_tensor(step)
        if given.dtype.is_floating_point or given.dtype == torch.bool:
            raise TypeError(f"{name}: step is {step!r}; give a number of steps, or one each delta.")
        if given.dim() == 0:
            if not 0 <= int(given) <= max(most):
                raise ValueError(
                    f"{name}: step {int(given)} was asked for; there are steps 0 (the original"
                    f" weights) to {max(most)}."
                )
            return [min(int(given), n) for n in most]
        if given.shape != (self.n_deltas,):
            raise ValueError(
                f"{name}: got steps of shape {tuple(given.shape)} for {self.n_deltas} deltas; give"
                " one number for all, or one for each."
            )
        for delta, (k, n) in enumerate(zip(given.tolist(), most, strict=True)):
            if not 0 <= k <= n:
                raise ValueError(
                    f"{name}: step {k} of delta {delta} was asked for; it has steps 0 to {n}."
                )
        return given.tolist()

    def _go_to(self, steps: list[int]) -> None:
        session_steps = [ends[k] for ends, k in zip(self._ends, steps, strict=True)]
        for track in self._engine.tracks:
            track.coefficients.show(session_steps)
        self.at_step = torch.tensor(steps)
        self._show()

    def _show(self) -> None:
        """Let forwards use the deltas that are meant, with the coefficients of now."""
        if self._attached:
            self._engine.show(self._shown)

    # ------------------------------------------------------------------ coexistence

    @property
    def attached(self) -> bool:
        """Whether the model computes with these deltas."""
        return self._attached and self._over is None

    def detach(self) -> None:
        """Free the model, which computes with its own weights again. The deltas are kept.

        Any number of adaptations may be detached; each keeps its factors until it is restored,
        merged, or forgotten. Doing it again changes nothing.

        Raises:
            RuntimeError: the adaptation is over.
        """
        self._require_not_over()
        if not self._attached:
            return
        with uninterrupted():
            self._base = adaptation_file.fingerprint(self._selected())
            # The trainer must not give these buffers to the next prompt.
            self._engine.in_use = True
            self._engine.detach()
            self._attached = False
            self._kept.forget()
            release(self.model)

    def attach(self) -> None:
        """Let the model compute with these deltas again, at the step where they were left.

        Doing it again changes nothing.

        Raises:
            RuntimeError: the adaptation is over; a session or another adaptation holds the model;
                or its weights are no longer those that the deltas were made for.
        """
        self._require_not_over()
        if self._attached:
            return
        owner = holder(self.model)
        if owner is not None:
            raise RuntimeError(
                f"attach: the model is held by {owner!r}. Detach, restore or merge that one first."
            )
        self._require_base("attach")
        with uninterrupted():
            hold(self.model, self)
            try:
                self._engine.attach()
                self._attached = True
                self._show()
            except BaseException:
                self._attached = False
                self._engine.detach()
                release(self.model)
                raise

    def __enter__(self) -> FactoredAdaptation:
        """Attach, if need be; leaving the block restores."""
        self.attach()
        return self

    @contextmanager
    def weights_of(self, delta: int) -> Iterator[nn.Module]:
        """The model with one delta's weights. With a single delta it has them all the time."""
        self._require_active()
        delta = self._one_delta("weights_of", delta)
        found = self._shown
        with uninterrupted() as held:
            try:
                self._shown = slice(delta, delta + 1)
                self._show()
                with held.released():
                    yield self.model
            finally:
                self._shown = found
                if self._over is None:
                    self._show()

    def _require_active(self) -> None:
        super()._require_active()
        if not self._attached:
            raise RuntimeError("this adaptation is detached; call attach() before using it.")

    def _require_base(self, name: str) -> None:
        """The model's weights have to be those that the deltas belong to."""
        change = self._engine.placement.change()
        different = change and f"its {change.name} was replaced, moved or cast"
        if not different and not self._attached:
            now = adaptation_file.fingerprint(self._selected())
            different = adaptation_file.difference(self._base, now)
        if different:
            owner = holder(self.model)
            who = f" (it is held by {owner!r})" if owner is not None else ""
            raise RuntimeError(
                f"{name}: the model's weights are not those that these deltas belong to:"
                f" {different}{who}. Bring them back first."
            )

    def _selected(self) -> list[tuple[str, Tensor]]:
        return [(selection.name, selection.param) for selection in self._engine.selections]

    # ------------------------------------------------------------------ weights

    @torch.no_grad()
    def state_dict(self, delta: int = 0) -> dict[str, Tensor]:
        """The model's ``state_dict`` with a delta's adapted weights, in tensors of its own.

        They are computed in float32 (float64 for a float64 model) and rounded to nearest.
        """
        delta = self._one_delta("state_dict", delta)
        self._require_base("state_dict")
        by_param = {id(factors.selection.param): factors for factors in self._engine.factors}
        adapted: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            # A tied weight is computed once.
            state[name] = adapted.get(id(tensor), tensor).detach().clone()
            if id(tensor) in by_param and id(tensor) not in adapted:
                deltas.adapt_(state[name], by_param[id(tensor)], delta)
                adapted[id(tensor)] = state[name]
        return state

    @torch.no_grad()
    def _merge(self, delta: int, rounding: str, seed: int, copy: bool, snapshot: bool) -> nn.Module:
        """:meth:`merge` of what was checked."""
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f"merge: rounding={rounding!r} is unknown; use 'nearest' or 'stochastic'."
            )
        if copy:
            return self._merged_copy(delta, rounding, seed)
        self._require_active()
        self._require_base("merge")
        with uninterrupted(), torch.inference_mode(False):
            kept = Snapshot(self._engine.selections, module=self.model) if snapshot else None
            self._engine.detach()
            try:
                self._write(delta, rounding, seed, {})
            except BaseException:
                if kept is None:
                    # Some weights are adapted and some are not: no delta belongs to these.
                    self._finish("merged in part")
                    raise
                kept.restore()
                self._engine.attach()
                self._show()
                raise
            if kept is None:
                self._finish("merged")
            else:
                self._unmerge = kept
                self._over, self._can_unmerge = "merged", True
        return self.model

    def _merged_copy(self, delta: int, rounding: str, seed: int) -> nn.Module:
        """A model of its own with the adapted weights."""
        owner = holder(self.model)
        if owner is not None and owner is not self:
            raise RuntimeError(
                f"merge: the model is held by {owner!r}, so it cannot be copied as it is. Detach,"
                " restore or merge that one first."
            )
        self._require_base("merge")
        copies: dict[int, Any] = {}
        with uninterrupted(), torch.inference_mode(False):
            attached = self._attached
            if attached:
                # The stand-ins of its modules must not be copied with it.
                self._engine.detach()
            try:
                model = copying.deepcopy(self.model, copies)
            finally:
                if attached:
                    self._engine.attach()
                    self._show()
            self._write(delta, rounding, seed, copies)
        return model

    def _write(self, delta: int, rounding: str, seed: int, copies: dict[int, Any]) -> None:
        """Adapt the parameters, or their copies, in place."""
        for number, factors in enumerate(self._engine.factors):
            param = factors.selection.param
            target = copies.get(id(param), param).detach()
            deltas.adapt_(target, factors, delta, rounding, seed * 1_000_003 + number)

    def restore(self) -> None:
        """Give the model its own weights back; free the factors. Again, it changes nothing.

        There is nothing to write, unless ``merge(snapshot=True)`` is to be undone.
        """
        if self._over is not None and not self._can_unmerge:
            return
        with uninterrupted():
            with self._phases("restore"):
                self._engine.restore()
                if self._unmerge is not None:
                    self._unmerge.restore()
            self._finish("restored")

    def _finish(self, how: str) -> None:
        super()._finish(how)
        self._engine.in_use = False
        self._attached = False
        # What it held may be large, and the adaptation be kept for its losses.
        self._engine = self._unmerge = self._products = None

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the deltas to a safetensors file that :meth:`Adaptation.load` reads.

        It has the factors of every step, the coefficients, settings and results, the prompt, and a
        checksum of each of the model's parameters, by which another model's weights are refused. A
        past_key_values in front of the prompt, the objective and the tokenizer are not kept.

        Raises:
            RuntimeError: the adaptation is over, or the model has other weights by now.
        """
        self._require_not_over()
        self._require_base("save")
        results = {
            "losses": self.losses,
            "grad_norms": self.grad_norms,
            "steps": self.steps.tolist(),
            "at_step": self.at_step.tolist(),
            "ends": [each[1:] for each in self._ends],
        }
        adaptation_file.write(path, self.model, self._engine, results, self.prompt)

    def to_lora(
        self,
        rank: int,
        path: str | os.PathLike[str] | None = None,
        *,
        delta: int | None = None,
        decay: str = "refuse",
    ) -> LoraAdapter:
        """The best LoRA adapter of a rank for a delta, in peft's format.

        Matrices are truncated by an SVD between orthonormal bases of their factors; norms go as
        ``modules_to_save`` in the model's dtype, biases of linears with ``lora_bias``. A weight
        that is both embedding and head gives an adapter at both places: right to compute with, but
        untie the two before peft's ``merge_and_unload``, which would add it twice.

        Args:
            rank: at most this; less where no delta has as many rows.
            path: folder to write; None to only return it.
            delta: which one; may be left out if there is only one.
            decay: weight decay scales W₀ as a whole, which no adapter can hold: "refuse", or
                "drop" that part.

        Returns:
            The adapter, with the relative error of each weight and of all together.

        Raises:
            RuntimeError: the adaptation is over, or the model has other weights by now.
            ValueError: a peft model, an embedding that scales, biases beside an embedding, or
                weight decay.
        """
        delta = self._one_delta("to_lora", delta)
        self._require_base("to_lora")
        adapter = lora_adapter(self.model, self._engine.factors, delta, rank, decay)
        if path is not None:
            adapter.save(path)
        return adapter

    # ------------------------------------------------------------------ norms and angles

    def delta_norm(self) -> Tensor:
        """‖W_t − W₀‖ of each delta over all selected parameters, (D,) float64, at ``at_step``.

        From the inner products of the steps' gradients with each other (and, where weights decay,
        with W₀), which the first call computes; at other steps it then costs nothing.

        Raises:
            RuntimeError: the adaptation is over, or the model has other weights by now.
        """
        self._require_not_over()
        if self._products.need_base:
            self._require_base("delta_norm")
        return self._products.delta_norm()

    def grad_cosine(self, s: int, t: int) -> Tensor:
        """Cosine between the gradients of two steps of each delta, before clipping: (D,) float64.

        Args:
            s: a step, counted from 0 as in ``losses``; −1 is a delta's last.
            t: another.

        Returns:
            NaN for a delta without one of the steps, or with a gradient of zero.

        Raises:
            RuntimeError: the adaptation is over.
            ValueError: no delta has such a step.
        """
        self._require_not_over()
        most = int(self.steps.max())
        for step in (s, t):
            if not -most <= step < most:
                raise ValueError(f"grad_cosine: step {step} was asked for; there are {most} steps.")
        cosines = torch.full((self.n_deltas,), torch.nan, dtype=torch.float64)
        for delta, n_steps in enumerate(self.steps.tolist()):
            i, j = (step + n_steps if step < 0 else step for step in (s, t))
            if 0 <= min(i, j) and max(i, j) < n_steps:
                cosines[delta] = self._products.cosine(delta, i, j)
        return cosines

    # ------------------------------------------------------------------ what happened

    def _engine_line(self) -> str:
        return self._line

    def _describe(self) -> str:
        ranks = [deltas.rank(self._engine.factors, delta) for delta in range(self.n_deltas)]
        rows = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        return (
            f"{self._engine.name}: weights never written, {self.nbytes / 2**20:.1f} MiB of factors"
            f" for {self.n_deltas} delta{'s' * (self.n_deltas != 1)}, rank at most {rows}"
        )

    def __repr__(self) -> str:
        state = self._over or ("attached" if self._attached else "detached")
        steps = self.steps.tolist()
        return f"<FactoredAdaptation of {self.n_deltas} delta(s), steps {steps}, {state}>"


def read_adaptation(
    path: str | os.PathLike[str], model: nn.Module, objective: Objective | None, tokenizer: Any
) -> FactoredAdaptation:
    """See :meth:`ttt_fast.adaptation.Adaptation.load`."""
    require_free(model)
    with uninterrupted():
        hold(model, f"the adaptation of {os.fspath(path)}, which is being loaded")
        engine = None
        try:
            engine, results, prompt = adaptation_file.read(path, model)
            steps, reduction = results["steps"], engine.config.reduction
            adapted = FactoredAdaptation(
                model=model,
                config=engine.config,
                engine=engine,
                objective=objective or partial(negative_log_likelihood, reduction=reduction),
                phases=Phases(engine.device),
                losses=[row[:n] for row, n in zip(results["losses"], steps, strict=True)],
                grad_norms=[row[:n] for row, n in zip(results["grad_norms"], steps, strict=True)],
                ends=results["ends"],
            )
            adapted.rewind(results["at_step"])
        except BaseException:
            if engine is not None:
                engine.restore()
            release(model)
            raise
        hold(model, adapted)
        adapted.prompt, adapted.tokenizer = prompt, tokenizer
    return adapted
