"""The dense engine: weights change in place, a snapshot brings them back.

A step is one forward and backward, the global gradient norm, and one fused pass over the selected
parameters (clip, decay, momentum, round, write). On short prompts the gradients of linear layers
are never formed whole (:mod:`ttt_fast.engines.products`). The weights can hold one delta at a time;
with several, the others wait in copies and are swapped in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ttt_fast import ops, profiling
from ttt_fast.batch import Batch
from ttt_fast.config import TTTConfig
from ttt_fast.engines.gradients import GradientBuffers
from ttt_fast.engines.groups import group_config, group_of_each, numbers
from ttt_fast.engines.head import OutputHead, output_head
from ttt_fast.engines.head_kinds import DenseHead, FrozenHead
from ttt_fast.engines.pieces import pieces_of, standing_in
from ttt_fast.engines.products import (
    Block,
    Gradient,
    Products,
    Scratch,
    blocks_for_calls,
    global_norm,
    takes_factors,
)
from ttt_fast.rounding import compute_dtype
from ttt_fast.scope import is_compiled
from ttt_fast.selection import Selection
from ttt_fast.snapshot import Snapshot
from ttt_fast.undo import UndoLog

_SEED_MASK = (1 << 63) - 1


@dataclass
class _DeltaState:
    """What the optimizer knows of one delta.

    Attributes:
        state: optimizer tensors by name, each a list with an entry for every selection.
        step_counts: steps that each selection has taken: a parameter that got no gradient sits a
            step out.
        deltas: float32 Δ of each selection (accumulate="delta").
        weights: the adapted weights while another delta is in the model; None before it was ever
            swapped out.
        landed: for each device (2,) float64, [Σ⟨W' − W, Δ⟩, Σ‖Δ‖²].
        steps: steps taken.
    """

    state: dict[str, list[Tensor]]
    step_counts: list[int]
    deltas: list[Tensor]
    landed: dict[torch.device, Tensor] = field(default_factory=dict)
    weights: list[Tensor] | None = None
    spare_weights: list[Tensor] | None = field(default=None, repr=False)
    steps: int = 0

    def tensors(self) -> list[Tensor]:
        """All of them."""
        lists = [*self.state.values(), self.deltas, self.landed.values()]
        lists += [self.weights or [], self.spare_weights or []]
        return [tensor for tensors in lists for tensor in tensors]


class DenseEngine:
    """Trains deltas in the model's own weights. Buffers live from prompt to prompt.

    Args:
        model: the user's model.
        selections: what adapts.
        config: settings.

    Attributes:
        resident: the delta whose weights are in the model; None for the original weights.
    """

    name = "dense"
    in_use = False  # only factors outlive a session
    together = False

    def __init__(
        self, model: nn.Module, selections: Sequence[Selection], config: TTTConfig
    ) -> None:
        self._model = model
        self.selections = list(selections)
        self.config = config
        self.views = [selection.view() for selection in self.selections]
        # rounding="torch" promises the bits of the model's own code, gradients included; of a model
        # under torch.compile a graph is made of that code, and none of ours can be in it.
        stock = config.rounding == "torch" or is_compiled(model)
        self.gradients = GradientBuffers(model, self.selections, reuse=not stock)
        self.snapshot: Snapshot | None = None
        self._scratch = Scratch()
        self._groups = group_of_each(model, self.selections, config)
        # Once: settings are checked whenever they are made.
        self._group_configs = {group: group_config(config, group) for group in set(self._groups)}
        self._pieces = [] if stock else list(pieces_of(model, config.backend, lambda x: False))
        self.head = OutputHead(model, self._trained_head())
        self._states: list[_DeltaState] = []
        self._spare: list[_DeltaState] = []
        self.resident: int | None = None

    # ------------------------------------------------------------------ life of a session

    @torch.inference_mode(False)
    def begin(self, n_deltas: int) -> None:
        """Take the snapshot and start ``n_deltas`` deltas at zero."""
        if n_deltas > 1 and self.config.snapshot == "undo":
            raise ValueError(
                f"snapshot='undo' logs the updates of one delta; the session has {n_deltas}. "
                "Use snapshot='device' or 'host'."
            )
        if self.snapshot is None:
            self.snapshot = Snapshot(
                self.selections,
                where=self.config.snapshot,
                module=self._model,
                backend=self.config.backend,
            )
        else:
            self.snapshot.take()
        # In two steps: a begin that fails half way must not leave a state in both lists.
        # A delta gets the buffers that it had last time: what is recorded knows their addresses.
        self._spare, self._states = self._states + self._spare, []
        self._states = [self._new_state() for _ in range(n_deltas)]
        self.resident = 0 if n_deltas == 1 else None

    @torch.inference_mode(False)
    def restore(self) -> None:
        """Give the model its weights back, bit for bit."""
        self.snapshot.restore()
        self.resident = None

    @torch.inference_mode(False)
    def make_resident(self, delta: int) -> None:
        """Put a delta's weights into the model."""
        if self.resident == delta:
            return
        self.set_aside()
        weights = self._states[delta].weights
        if weights is None:
            self.snapshot.restore()
        else:
            ops.copy_(self.views, weights, backend=self.config.backend)
        self.resident = delta

    @torch.inference_mode(False)
    def set_aside(self) -> None:
        """Keep the resident delta's weights in a copy, so that another may take the model."""
        if self.resident is None:
            return
        state = self._states[self.resident]
        if state.weights is None:
            state.weights = state.spare_weights or [torch.empty_like(v) for v in self.views]
        ops.copy_(state.weights, self.views, backend=self.config.backend)
        self.resident = None

    def merge(self) -> None:
        """Leave the resident weights in the model for good."""
        self.resident = None

    def start_over(self) -> None:
        """The original weights, and all deltas at zero, whatever happened since :meth:`begin`."""
        self.restore()
        self.begin(len(self._states))

    @contextmanager
    def showing(self, deltas: Sequence[int]) -> Iterator[None]:
        """The model with one delta's weights; afterwards as it was."""
        outer = self.resident
        try:
            self.make_resident(deltas[0])
            yield
        finally:
            if outer is None:
                self.set_aside()
                self.restore()
            else:
                self.make_resident(outer)

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """The model with its own weights; afterwards as it was.

        Raises:
            ValueError: weights that were logged as they changed cannot be there for a while.
        """
        outer = self.resident
        if outer is None or self._states[outer].steps == 0:
            yield
            return
        if self.config.snapshot == "undo":
            raise ValueError(
                "snapshot='undo' has the original weights again only at the end, and keys and"
                " values of these were asked for. Use snapshot='device' or 'host'."
            )
        try:
            self.set_aside()
            self.restore()
            yield
        finally:
            self.make_resident(outer)

    def cancel(self) -> None:
        """The session did not come about: no weight has changed yet."""

    def settle(self) -> None:
        """The session is over: with several deltas, the model gets the original weights."""
        if len(self._states) > 1:
            self.set_aside()
            self.restore()

    @contextmanager
    def recording(self, deltas: Sequence[int], rows: Batch) -> Iterator[None]:
        """Record one forward and backward of a delta on its rows."""
        self.make_resident(deltas[0])
        with self.gradients.recording(), standing_in(self._pieces):
            yield

    def recomputing(self) -> AbstractContextManager[None]:
        """Around what is computed again in a backward: what it saves is saved as it was."""
        return nullcontext()

    def mark(self) -> Callable[[], None]:
        """Note what is recorded; return what takes back the rest. A forward records nothing."""
        return lambda: None

    def finish_step(self, found_inf: Tensor) -> None:
        """Nothing is left to do: the weights have changed."""

    # ------------------------------------------------------------------ for a recorded loop

    def open_recording(self) -> None:
        """All that the steps start from is there since :meth:`begin`, at the same addresses."""

    def memory(self) -> list[Tensor]:
        """What steps read and write and what lives from prompt to prompt."""
        kept = [tensor for state in self._states for tensor in state.tensors()]
        return [
            *self.views, *self.snapshot.memory, *kept, *self.gradients.memory,
            *self._scratch.memory,
        ]  # fmt: skip

    def baked(self) -> Hashable:
        """Numbers of the host that steps are launched with."""
        return tuple((group, numbers(c)) for group, c in sorted(self._group_configs.items()))

    def bookkeeping(self) -> Any:
        """What the steps of a session have changed on the host."""
        states = [
            (list(state.step_counts), state.steps, state.weights, dict(state.landed))
            for state in self._states
        ]
        return self.resident, states

    def adopt(self, bookkeeping: Any) -> None:
        """Note what the steps of a replay have changed, as if they had been taken."""
        self.resident, states = bookkeeping
        for state, (step_counts, steps, weights, landed) in zip(self._states, states, strict=True):
            state.step_counts, state.steps = list(step_counts), steps
            state.weights, state.landed = weights, dict(landed)

    # ------------------------------------------------------------------ one step

    @torch.inference_mode(False)
    def update(self, deltas: Sequence[int], found_inf: Tensor) -> Tensor:
        """Clip and apply the collected gradients to the resident delta.

        Args:
            deltas: the one that is resident.
            found_inf: (D,); set to 1 if the norm is not finite; where it is not 0 nothing changes.

        Returns:
            (1,) gradient norm, a tensor: nothing here waits for the device.
        """
        (delta,) = deltas
        found_inf = found_inf[delta]
        gradients = self.gradients.collect()
        with profiling.annotate("norm", self.views[0].device):
            norm = self._norm([g for g in gradients if g is not None])
        found_inf.copy_(torch.maximum(found_inf, (~torch.isfinite(norm)).to(found_inf)))
        state = self._states[delta]
        alike: dict[tuple[int, int, torch.device], list[int]] = {}
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                key = (self._groups[i], state.step_counts[i], self.views[i].device)
                alike.setdefault(key, []).append(i)
                state.step_counts[i] += 1
        number = count()
        for (group, taken, device), members in alike.items():
            options = self._options(delta, group, norm.to(device), found_inf)
            factors = self._factors(members, gradients)
            if factors:
                seeded = options | {"seed": self._seed(delta, next(number))}
                self._update_factors(delta, group, taken, factors, seeded)
            others = [i for i in members if i not in factors]
            for blocks in self._calls(others, gradients):
                seeded = options | {"seed": self._seed(delta, next(number))}
                self._update_blocks(delta, group, taken, blocks, gradients, seeded)
        state.steps += 1
        return norm[None]

    def landed(self, delta: int) -> float:
        """update_landed = Σ⟨W' − W, Δ⟩ / Σ‖Δ‖² of a delta; 1.0 before any update."""
        sums = [landed.tolist() for landed in self._states[delta].landed.values()]
        dot, square = sum(s[0] for s in sums), sum(s[1] for s in sums)
        return dot / square if square > 0 else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshot, the optimizer state and the weights that were set aside."""
        total = self.snapshot.nbytes if self.snapshot else 0
        for state in self._states:
            lists = [*state.state.values(), state.deltas, state.weights or []]
            total += sum(tensor.nbytes for tensors in lists for tensor in tensors)
        return total

    # ------------------------------------------------------------------ details

    def _trained_head(self) -> FrozenHead | None:
        """The model's head and where its gradients go, if there is one that is known."""
        module = output_head(self._model)
        if module is None:
            return None
        taken = self.gradients.taken(module)
        return FrozenHead(module) if taken is None else DenseHead(module, *taken)

    def _new_state(self) -> _DeltaState:
        """A delta at zero, in buffers of an earlier session where there are any."""
        if self._spare:
            state = self._spare.pop(0)
            state.spare_weights = state.weights or state.spare_weights
            state.weights, state.steps = None, 0
            state.step_counts = [0] * len(self.views)
            # Momentum is not read on the first step, so its buffers may keep what they hold.
            moments = state.state.values() if self.config.optimizer == "adamw" else ()
            for tensors in (*moments, state.deltas, state.landed.values()):
                for tensor in tensors:
                    tensor.zero_()
            return state
        names = ("exp_avgs", "exp_avg_sqs") if self.config.optimizer == "adamw" else ()
        if self.config.optimizer == "sgd" and self._uses_momentum():
            names = ("momentum_buffers",)
        return _DeltaState(
            state={name: [self._new_state_tensor(v) for v in self.views] for name in names},
            step_counts=[0] * len(self.views),
            deltas=(
                [torch.zeros_like(v, dtype=compute_dtype(v.dtype)) for v in self.views]
                if self.config.accumulate == "delta"
                else []
            ),
        )

    def _new_state_tensor(self, view: Tensor) -> Tensor:
        # AdamW's second moment does not move in 16 bits: 0.999 v + 0.001 g² rounds back to v.
        wide = self.config.optimizer == "adamw" and self.config.rounding != "torch"
        dtype = compute_dtype(view.dtype) if wide else view.dtype
        new = torch.zeros if self.config.optimizer == "adamw" else torch.empty
        return new(view.shape, dtype=dtype, device=view.device)

    def _uses_momentum(self) -> bool:
        return any(config.momentum > 0 for config in self._group_configs.values())

    def _norm(self, gradients: list[Gradient]) -> Tensor:
        """Global norm, on the first gradient's device; stock torch's bits for rounding="torch"."""
        if self.config.rounding == "torch":
            return torch.nn.utils.get_total_norm(gradients, foreach=True)
        return global_norm(gradients, backend=self.config.backend)

    def _factors(
        self, members: list[int], gradients: list[Gradient | None]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Factors (a, b) of the gradients aᵀ b that a kernel forms as it takes the step."""
        config, device = self.config, self.views[members[0]].device
        if (
            config.optimizer != "sgd"
            or config.accumulate == "delta"
            or config.snapshot == "undo"
            or not takes_factors(device.type, config.backend)
        ):
            return {}
        found = {i: gradients[i].factors for i in members if isinstance(gradients[i], Products)}
        return {
            i: pair
            for i, pair in found.items()
            if pair is not None and all(f.dtype == self.views[i].dtype for f in pair)
        }

    def _calls(self, members: list[int], gradients: list[Gradient | None]) -> Iterator[list[Block]]:
        """Weights whose gradients are there in one call of the fused update, others in blocks."""
        whole = [Block(i) for i in members if isinstance(gradients[i], Tensor)]
        if whole:
            yield whole
        products = [i for i in members if isinstance(gradients[i], Products)]
        yield from blocks_for_calls(self.views, products, self.config.snapshot == "undo")

    def _seed(self, delta: int, number: int) -> int:
        """Of a call of the step: calls must not share their random bits either."""
        stream = self.config.random_stream(delta, self._states[delta].steps)
        return (stream ^ (number << 48)) & _SEED_MASK

    def _options(self, delta: int, group: int, norm: Tensor, found_inf: Tensor) -> dict[str, Any]:
        """What the calls of the fused updates are told alike, on one device."""
        config, state, device = self._group_configs[group], self._states[delta], norm.device
        landed = state.landed.get(device)
        if landed is None:
            landed = state.landed[device] = torch.zeros(2, dtype=torch.float64, device=device)
        return {
            "lr": config.lr_at(state.steps),
            "weight_decay": config.weight_decay,
            "grad_norm": norm,
            "max_grad_norm": config.max_grad_norm,
            "rounding": config.rounding,
            "found_inf": found_inf.to(device),
            "landed": landed,
        }

    def _sgd_options(self, group: int, taken: int) -> dict[str, Any]:
        config = self._group_configs[group]
        return {
            "momentum": config.momentum, "dampening": config.dampening,
            "nesterov": config.nesterov, "first_step": taken == 0,
            "decoupled_weight_decay": config.decoupled_weight_decay,
        }  # fmt: skip

    def _update_factors(
        self,
        delta: int,
        group: int,
        taken: int,
        factors: Mapping[int, tuple[Tensor, Tensor]],
        options: dict[str, Any],
    ) -> None:
        """One call of the fused update that forms the gradients itself."""
        dys, xs = zip(*factors.values(), strict=True)
        buffers: list[Tensor] = []
        if self._group_configs[group].momentum > 0:
            buffers = [self._states[delta].state["momentum_buffers"][i] for i in factors]
        ops.rank_sgd_(
            [self.views[i] for i in factors], xs, dys, buffers,
            backend=ops.backend_for("rank_sgd_", self.config.backend),
            **options, **self._sgd_options(group, taken),
        )  # fmt: skip

    def _update_blocks(
        self,
        delta: int,
        group: int,
        taken: int,
        blocks: list[Block],
        gradients: list[Gradient | None],
        options: dict[str, Any],
    ) -> None:
        """One call of the fused update: same options, same step count, same device."""
        config, state = self._group_configs[group], self._states[delta]

        def pick(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [block.of(tensors[block.index]) for block in blocks] if tensors else []

        params = pick(self.views)
        formed = isinstance(gradients[blocks[0].index], Tensor)
        grads = pick(gradients) if formed else self._scratch.fill(blocks, params, gradients)
        options = options | {
            "deltas": pick(state.deltas),
            "bases": pick(self.snapshot.originals if config.accumulate == "delta" else []),
            "undo": self._undo_log(blocks) if config.snapshot == "undo" else None,
            "backend": config.backend,
        }
        if config.optimizer == "adamw":
            ops.adamw_(
                params, grads, pick(state.state["exp_avgs"]),
                pick(state.state["exp_avg_sqs"]), betas=config.betas, eps=config.eps,
                step_index=taken + 1, **options,
            )  # fmt: skip
        else:
            buffers = pick(state.state["momentum_buffers"]) if config.momentum > 0 else []
            ops.sgd_(params, grads, buffers, **options, **self._sgd_options(group, taken))

    def _undo_log(self, blocks: list[Block]) -> UndoLog | None:
        log = self.snapshot.undo_log([block.index for block in blocks])
        if log is not None:
            log.offsets = [
                offset if offset < 0 else offset + block.offset
                for offset, block in zip(log.offsets, blocks, strict=True)
            ]
        return log
