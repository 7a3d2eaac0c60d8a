"""The factored engine: exact SGD on every selected parameter, and no weight is ever written.

A step is one forward and backward of all its deltas together. What it leaves behind are two rows of
factors a token and weight, one gradient a norm or bias, and a column of coefficients
(:mod:`ttt_fast.sgd`). There are no gradients, no momentum buffer and no snapshot; to restore is to
give the modules their ``forward`` back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttt_fast import placement, profiling
from ttt_fast.batch import Batch
from ttt_fast.config import TTTConfig
from ttt_fast.engines.desk import Desk, Layout
from ttt_fast.engines.factorable import take_over, unsupported
from ttt_fast.engines.factors import (
    Factors,
    Inputs,
    Lookups,
    MatrixFactors,
    Padding,
    Track,
    VectorFactors,
    of_track,
    squared_norm,
)
from ttt_fast.engines.groups import group_config, group_of_each, numbers
from ttt_fast.engines.head import OutputHead, output_head
from ttt_fast.engines.head_kinds import FactoredHead, FrozenHead
from ttt_fast.engines.pieces import pieces_of, standing_in
from ttt_fast.engines.rows import RowBuffer, Rows
from ttt_fast.placement import Placement
from ttt_fast.rounding import compute_dtype
from ttt_fast.selection import Selection
from ttt_fast.sgd import Coefficients, clip_coefficient


class FactoredEngine:
    """Trains deltas as factors beside the model's own weights. Buffers live from prompt to prompt.

    Args:
        model: the user's model.
        selections: what adapts.
        config: settings.

    Attributes:
        placement: where the weights lie that the deltas of now belong to.

    Raises:
        ValueError: a selected parameter cannot be factored; names it.
    """

    name = "factored"
    in_use = False  # by a detached adaptation, which keeps the factors
    together = True

    def __init__(
        self, model: nn.Module, selections: Sequence[Selection], config: TTTConfig
    ) -> None:
        self._model = model
        self.selections = list(selections)
        self.config = config
        self.device = self.selections[0].param.device
        self.dtype = compute_dtype(self.selections[0].param.dtype)
        # Weakly: the buffers, gigabytes maybe, go with the engine, not when Python next looks.
        new_inputs = weakref.WeakMethod(self._new_inputs)
        self.desk = Desk(self.selections[0].param, config.backend, lambda x: new_inputs()(x))
        reasons = unsupported(model, self.selections)
        if reasons:
            raise ValueError(
                f"engine='factored' cannot adapt {reasons[0]}"
                + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
                + ". Use engine='dense', or a scope that leaves it out."
            )
        self._groups = group_of_each(model, self.selections, config)
        self.factors, self._sites = take_over(model, self.selections, self.desk, config.backend)
        taken = {site.module for site in self._sites}
        pieces = pieces_of(model, config.backend, self.desk.is_differentiated)
        self._pieces = [piece for piece in pieces if piece.module not in taken]
        self.head = OutputHead(model, self._trained_head())
        self.placement = self._placement_now()
        self._inputs: list[Inputs] = []
        self._attached = ExitStack()

    # ------------------------------------------------------------------ life of a session

    def begin(
        self, n_deltas: int, capacity: int = 64, configs: Sequence[TTTConfig] | None = None
    ) -> None:
        """Start ``n_deltas`` deltas at zero and take the modules over.

        Args:
            n_deltas: D.
            capacity: rows of tokens that each delta is expected to need; more is made as needed.
            configs: settings of each delta, where they differ (in lr, momentum, weight decay and
                clip); default the engine's for all.
        """
        self._require_same_weights()
        self.placement = self._placement_now()
        self.n_deltas = n_deltas
        self.configs = [self.config] * n_deltas if configs is None else list(configs)
        self._capacity = capacity
        groups = sorted(set(self._groups))
        self._group_configs = {
            group: [group_config(config, group) for config in self.configs] for group in groups
        }
        self.start_over()
        self.attach()

    def start_over(self) -> None:
        """Every delta at zero. Whatever the steps start from is filled in on the device."""
        self._root = Rows(self.n_deltas)
        self.steps = 0
        self._steps_of = [0] * self.n_deltas
        limits = [config.max_grad_norm for config in self.configs]
        limits = [torch.inf if limit is None else limit for limit in limits]
        self._limits = self._filled(limits, torch.float64)
        tracks = {group: self._new_track(group) for group in self._group_configs}
        self.tracks = list(tracks.values())
        for inputs in self._inputs:
            inputs.begin(self._root, self._capacity)
        for factors, group in zip(self.factors, self._groups, strict=True):
            rows = self._capacity if isinstance(factors, MatrixFactors) else self.config.steps
            factors.begin(self._root, rows, tracks[group])
        self._new_step()
        if self.desk.layout is not None:
            self.show(slice(0, self.n_deltas))

    def attach(self) -> None:
        """Let the modules compute with the deltas."""
        with ExitStack() as attached:
            for site in self._sites:
                if "forward" in vars(site.module):
                    raise ValueError(
                        f"{site.name} has a forward of its own on the instance (accelerate's hooks"
                        " set one), which cannot be replaced. Use engine='dense'."
                    )
                attached.callback(vars(site.module).pop, "forward", None)
                site.module.forward = site.forward
            attached.enter_context(standing_in(self._pieces))
            hook = self._model.register_forward_pre_hook(
                self._count_rows, with_kwargs=True, prepend=True
            )
            attached.callback(hook.remove)
            self.show(slice(0, self.n_deltas))
            self._attached = attached.pop_all()

    def detach(self) -> None:
        """Give the modules back. The factors stay."""
        self._attached.close()
        self.desk.layout = None

    def restore(self) -> None:
        """Let the model compute with its own weights again; nothing was written to them."""
        self.detach()

    def cancel(self) -> None:
        """The session did not come about: give the modules back."""
        self.detach()

    def settle(self) -> None:
        """The session is over; its deltas stay attached."""

    @contextmanager
    def showing(self, deltas: Sequence[int]) -> Iterator[None]:
        """Let forwards use consecutive deltas; afterwards the ones that they used before."""
        outer = self.desk.layout
        try:
            self.show(slice(deltas[0], deltas[-1] + 1))
            yield
        finally:
            self.desk.layout = outer

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """The model with its own weights and code; afterwards as it was."""
        outer = self.desk.layout
        self.detach()
        try:
            yield
        finally:
            self.attach()
            self.desk.layout = outer

    def landed(self, delta: int) -> float:
        """Share of the update that reached what the forward reads: 1 by definition."""
        return 1.0

    def show(self, deltas: slice) -> None:
        """Let forwards outside a step use these deltas, with the coefficients of now."""
        self.desk.layout = Layout(deltas, n_rows=deltas.stop - deltas.start)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(inputs.buffer.nbytes for inputs in self._inputs) + sum(
            factors.nbytes for factors in self.factors
        )

    # ------------------------------------------------------------------ for a recorded loop

    def open_recording(self) -> None:
        """Make what the steps start from once more, for the recording to have it, too."""
        self.start_over()

    def memory(self) -> list[Tensor]:
        """What steps read and write and what lives from prompt to prompt."""
        return [self.desk.anchor, *(buffer.memory for buffer in self._buffers())]

    def baked(self) -> Hashable:
        """Numbers of the host that steps are launched with."""
        return tuple(
            (group, tuple(map(numbers, configs))) for group, configs in self._group_configs.items()
        )

    def bookkeeping(self) -> Any:
        """What the steps of a session have changed on the host."""
        vectors = [each for each in self.factors if isinstance(each, VectorFactors)]
        rows = [(use, use.rows) for use in (*self._recorders(), *vectors)]
        filled = [(buffer, buffer.filled) for buffer in self._buffers()]
        steps = self.steps, list(self._steps_of)
        number = {track: n for n, track in enumerate(self.tracks)}
        tracks = [track.copy() for track in self.tracks], [number[f.track] for f in self.factors]
        return *steps, self._root, self._limits, tracks, rows, filled

    def adopt(self, bookkeeping: Any) -> None:
        """Note what the steps of a replay have changed, as if they had been taken."""
        self.steps, steps_of, self._root, self._limits, tracks, rows, filled = bookkeeping
        self._steps_of = list(steps_of)
        tracks, numbers_of_factors = tracks
        self.tracks = [track.copy() for track in tracks]
        for factors, n in zip(self.factors, numbers_of_factors, strict=True):
            factors.track = self.tracks[n]
        for use, after in rows:
            use.rows = use.pending = after
        for buffer, count in filled:
            buffer.filled = count
        self._new_step()
        self.show(slice(0, self.n_deltas))

    def _buffers(self) -> Iterator[RowBuffer]:
        for inputs in self._inputs:
            yield inputs.buffer
        for factors in self.factors:
            yield from factors.buffers

    # ------------------------------------------------------------------ one step

    @contextmanager
    def recording(self, deltas: Sequence[int], rows: Batch) -> Iterator[None]:
        """Record one forward and backward of consecutive deltas on their rows."""
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError(
                "engine='factored' keeps factors in the dtype of the weights, so it does not run"
                " under torch.autocast. Cast the model instead, or use engine='dense'."
            )
        shown = self.desk.layout
        span = slice(deltas[0], deltas[-1] + 1)
        n = len(deltas)
        N, T = rows.input_ids.shape
        padding = Padding((rows.attention_mask != 0).reshape(n, -1)) if rows.padded else None
        self.desk.layout = Layout(span, N, self.steps, n_tokens=N * T // n, padding=padding)
        try:
            yield
        finally:
            self._forget_forward()
            self.desk.layout = shown

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Around what is computed again in a backward: its inputs have been recorded."""
        self.desk.recomputing = True
        try:
            yield
        finally:
            self.desk.recomputing = False

    def mark(self) -> Callable[[], None]:
        """Note what is recorded; return what takes back the rest of a forward."""
        found = {id(each): each.pending for each in self._recorders()}

        def undo() -> None:
            self._forget_forward()
            for each in self._recorders():
                each.pending = found.get(id(each), each.rows)

        return undo

    @torch.no_grad()
    def update(self, deltas: Sequence[int], found_inf: Tensor) -> Tensor:
        """Close the recorded forward of some deltas, inside :meth:`recording`.

        Args:
            deltas: which ones.
            found_inf: (D,); set to 1 where the norm is not finite; such a delta never moves again.

        Returns:
            (n,) global gradient norms, a tensor: nothing here waits for the device.

        Raises:
            ValueError: a selected parameter got a gradient that did not come through its module.
        """
        for selection in self.selections:
            if selection.param.grad is not None:
                raise ValueError(
                    f"engine='factored': {selection.name} is used outside the module that owns it,"
                    " so a part of its gradient would be missing. Use engine='dense'."
                )
        span = slice(deltas[0], deltas[-1] + 1)
        with profiling.annotate("norm", self.device):
            reached = [factors for factors in self.factors if factors.close_forward(span)]
            norms = squared_norm(reached, span, self.device, self.config.backend)
        norms = norms.sqrt().to(self.dtype)
        for factors in reached:
            self._reached.setdefault(id(factors), set()).update(deltas)
        broken = ~torch.isfinite(norms) | (found_inf[span] != 0)
        if placement.look_waits(broken.device) or bool(broken.any()):
            # Its coefficients will be 0, and 0 times NaN is not 0.
            for factors in self.factors:
                factors.blank(span, broken)
        found_inf[span] = torch.maximum(found_inf[span], (~torch.isfinite(norms)).to(found_inf))
        self._norms[span] = norms.to(self._norms)
        self._stepping.update(deltas)
        return norms

    @torch.no_grad()
    def finish_step(self, found_inf: Tensor) -> None:
        """Advance the coefficients of every delta that took part in the step."""
        clip = clip_coefficient(self._norms, self._limits)
        finite = found_inf == 0
        for track in list(self.tracks):
            parts: dict[frozenset[int], list[Factors]] = {}
            for factors in of_track(self.factors, track):
                reached = frozenset(self._reached.get(id(factors), ()))
                parts.setdefault(reached, []).append(factors)
            # A parameter that got no gradient sits the step out, with coefficients of its own.
            for members in list(parts.values())[1:]:
                self._split(track, members)
            for reached, members in parts.items():
                self._advance(members[0].track, reached, clip, finite)
        for inputs in self._inputs:
            inputs.rows = inputs.pending
        for factors in self.factors:
            factors.close_step()
        for delta in self._stepping:
            self._steps_of[delta] += 1
        self.steps += 1
        self._new_step()
        # The coefficients that forwards outside a step use are the new ones.
        self.show(self.desk.layout.deltas)

    def _recorders(self) -> list[Inputs | Lookups]:
        """Whatever writes rows in a forward."""
        lookups = (each.lookups for each in self.factors if isinstance(each, MatrixFactors))
        return [*self._inputs, *(each for each in lookups if each is not None)]

    def _forget_forward(self) -> None:
        for inputs in self._inputs:
            inputs.forget()
        for factors in self.factors:
            factors.open_forward()
        self.desk.newest = None

    def _trained_head(self) -> FrozenHead | None:
        """The model's head and how it trains, if there is one that is known."""
        module = output_head(self._model)
        sites = [site for site in self._sites if site.module is module]
        if module is None or not sites:
            return None if module is None else FrozenHead(module)
        matrix = sites[0].matrix
        whole = matrix is not None and matrix.selection.rows is None
        return FactoredHead(sites[0]) if whole else None

    def _placement_now(self) -> Placement:
        return Placement([(each.name, each.param) for each in self.selections], self._model)

    def _require_same_weights(self) -> None:
        change = self.placement.change(address=False)
        if change is not None:
            raise RuntimeError(
                f"adapt: {change.name} was {change.was} and is {change.now}: it was replaced,"
                " resized, moved or cast since the trainer was made. Make a new TTTTrainer."
            )

    def _advance(self, track: Track, reached: frozenset[int], clip: Tensor, finite: Tensor) -> None:
        active = self._filled([d in reached for d in range(self.n_deltas)], torch.bool)
        configs = self._group_configs[track.group]
        rates = [config.lr_at(steps) for config, steps in zip(configs, self._steps_of, strict=True)]
        lr = self._filled(rates, torch.float64)
        track.coefficients.advance(clip, lr, active & finite)

    def _filled(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Numbers of the host on the device, (D,): filled in there, where a copy would wait."""
        tensor = torch.full((len(values),), values[0], dtype=dtype, device=self.device)
        for i, value in enumerate(values[1:], 1):
            if value != values[0]:
                tensor[i].fill_(value)
        return tensor

    def _split(self, track: Track, members: Sequence[Factors]) -> None:
        """Give some parameters of a track coefficients of their own, equal so far."""
        part = track.copy()
        for factors in members:
            factors.track = part
        self.tracks.append(part)

    def _new_track(self, group: int) -> Track:
        configs = self._group_configs[group]

        def each(name: str) -> Tensor:
            values = [getattr(config, name) for config in configs]
            return self._filled(values, torch.float64)

        coefficients = Coefficients(
            self.n_deltas,
            momentum=each("momentum"),
            # Nesterov momentum has none, which is better known without a look at the device.
            dampening=0.0 if configs[0].nesterov else each("dampening"),
            nesterov=configs[0].nesterov,
            weight_decay=each("weight_decay"),
            decoupled_weight_decay=configs[0].decoupled_weight_decay,
            device=self.device,
        )
        return Track(group, coefficients, decays=any(c.weight_decay != 0 for c in configs))

    def _new_step(self) -> None:
        self._reached: dict[int, set[int]] = {}
        self._stepping: set[int] = set()
        self._norms = torch.zeros(self.n_deltas, dtype=torch.float64, device=self.device)

    def _new_inputs(self, x: Tensor) -> Inputs:
        inputs = Inputs(x.shape[-1], x.dtype, x.device)
        inputs.begin(self._root, self._capacity)
        self._inputs.append(inputs)
        return inputs

    def _count_rows(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each forward of the model: its rows have to be divisible among the deltas."""
        layout = self.desk.layout
        if layout is None or layout.recording:
            return
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None:
            return
        if given.shape[0] % layout.n:
            raise ValueError(
                f"the model holds {layout.n} deltas but was given {given.shape[0]} rows; give each"
                " delta the same number of rows, one after the other, or use `with"
                " adapted.weights_of(delta) as model`."
            )
        layout.n_rows = given.shape[0]
