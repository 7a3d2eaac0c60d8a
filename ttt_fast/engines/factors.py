"""Factors: what the factored engine keeps in place of gradients, momentum and snapshot.

A linear weight's gradient in one step is G = dYᵀ X, with a row for each token. The rows of all
steps lie one behind the other (:mod:`ttt_fast.engines.rows`), X in one buffer and dY in another;
the coefficients of the steps (:mod:`ttt_fast.sgd`) give those of the rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ttt_fast import ops, placement
from ttt_fast.engines.products import Uses, ghost_norms
from ttt_fast.engines.rows import RowBuffer, Rows, Start
from ttt_fast.rounding import compute_dtype
from ttt_fast.selection import RowSlice, Selection
from ttt_fast.sgd import Coefficients


class Padding:
    """Which vectors of a batch are padding: whatever they hold, NaN included, is not to get in.

    Args:
        tokens: (n, M) bool, false at padding.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._padding = ~tokens
        # A few rows by their numbers take a thirtieth of the time of a mask over all. Elsewhere
        # than on a CPU the host would have to wait for the numbers.
        numbered = not placement.look_waits(tokens.device)
        self._where = self._padding.nonzero(as_tuple=True) if numbered else None

    def blank_(self, rows: Tensor) -> None:
        """Make the vectors (n, M, width) zero that are padding."""
        if self._where is None:
            rows.masked_fill_(self._padding[:, :, None], 0)
        else:
            rows[self._where] = 0

    def blanked(self, rows: Tensor) -> Tensor:
        """A copy with zeros there."""
        rows = rows.clone()
        self.blank_(rows)
        return rows


class Inputs:
    """X of one weight, or of several that are given the same tensor (q, k and v; gate and up).

    Attributes:
        buffer: the rows.
        rows: which steps the rows belong to, of all steps that are over.
        pending: the same with what the step in progress has written.
        calls: (start, count) of each write of the forward in progress.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = RowBuffer(width, dtype, device)
        self.calls: list[tuple[Start, int]] = []
        # Weakly: its rows are in the buffer, and nobody else may need it until the backward pass.
        self._last: tuple[weakref.ref[Tensor], int, Start] | None = None

    def begin(self, root: Rows, capacity: int) -> None:
        """Start a session without rows."""
        self.buffer.begin(len(root.lengths), capacity)
        self.rows = self.pending = root
        self.forget()

    def forget(self) -> None:
        """Be ready for another forward."""
        self._last = None
        self.calls = []

    @property
    def is_new(self) -> bool:
        """Whether all there is so far is one write of the step in progress."""
        return len(self.calls) == 1 and not any(self.rows.lengths)

    def is_last(self, x: Tensor) -> bool:
        """Whether x is the very tensor that was recorded last, unchanged."""
        last = self._last
        return last is not None and last[0]() is x and last[1] == x._version

    def record(
        self, x: Tensor, rows: Tensor, deltas: slice, step: int, padding: Padding | None
    ) -> tuple[Start, Tensor | None]:
        """Give the rows (n, M, in) of tensor x a place, unless another weight did.

        Returns:
            their start, and where the caller has to write them; None where they are there already.
        """
        if self.is_last(x):
            return self._last[2], None
        start, count = self.pending.start(deltas), rows.shape[1]
        place = self.buffer.room(deltas, start, count)
        if place is None:
            self.buffer.write(deltas, start, rows if padding is None else padding.blanked(rows))
        self.pending = self.pending.append(step, deltas, count)
        self.calls.append((start, count))
        self._last = (weakref.ref(x), x._version, start)
        return start, place


class Lookups:
    """The gradient of an embedding: G = Σ over tokens, dE_t added to the row of token t.

    Attributes:
        ids: token ids, (D, rows, 1).
        dy: dE, the gradient at the raw lookup.
        rows: which steps they belong to, of all steps that are over; ``pending`` with the one in
            progress.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.ids = RowBuffer(1, torch.int64, device)
        self.dy = RowBuffer(width, dtype, device)
        self.open_calls: dict[Start, int] = {}
        self.arrived = False

    def begin(self, root: Rows, capacity: int) -> None:
        """Start a session without rows."""
        self.ids.begin(len(root.lengths), capacity)
        self.dy.begin(len(root.lengths), capacity)
        self.rows = self.pending = root

    def record_ids(self, deltas: slice, step: int, ids: Tensor) -> Start:
        """Write the ids (n, M) of a call; return the start of its rows."""
        start, count = self.pending.start(deltas), ids.shape[1]
        self.ids.write(deltas, start, ids[:, :, None])
        self.pending = self.pending.append(step, deltas, count)
        self.open_calls[start] = count
        return start

    def record_dy(self, deltas: slice, start: Start, dy: Tensor) -> None:
        """Write dE (n, M, width) of a call."""
        self.dy.write(deltas, start, dy)
        del self.open_calls[start]
        self.arrived = True


class MatrixFactors:
    """The gradients of one matrix: G = Σ dYᵀ X over its linear uses, + lookups where it embeds.

    Attributes:
        selection: the parameter.
        weight: its values as (out, in), whichever way it is stored; ``weight_t`` as (in, out).
        inputs: X; None before the first linear use.
        dy: dY of the selected outputs; its rows are those of ``inputs``.
        lookups: its use as an embedding, None if it has none.
        track: the coefficients.
    """

    def __init__(self, selection: Selection, transposed: bool, embeds: bool) -> None:
        self.selection = selection
        self._transposed = transposed
        stored, rows = selection.param.detach(), selection.rows
        self.weight = stored.t() if transposed else stored
        self.weight_t = self.weight.t()
        n_out, n_in = self.weight.shape
        if rows is not None:
            n_out = n_out // rows.period * rows.length
        self.inputs: Inputs | None = None
        self.dy = RowBuffer(n_out, stored.dtype, stored.device)
        self.lookups = Lookups(n_in, stored.dtype, stored.device) if embeds else None
        self.track: Track | None = None
        self._arrived: set[Start] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of dY and the lookups; X is counted with ``inputs``."""
        lookups = self.lookups
        return self.dy.nbytes + (lookups.ids.nbytes + lookups.dy.nbytes if lookups else 0)

    @property
    def buffers(self) -> list[RowBuffer]:
        """Where dY and the lookups are."""
        lookups = self.lookups
        return [self.dy, *([lookups.ids, lookups.dy] if lookups else [])]

    def begin(self, root: Rows, capacity: int, track: Track) -> None:
        """Start a session without rows."""
        self.dy.begin(len(root.lengths), capacity)
        if self.lookups is not None:
            self.lookups.begin(root, capacity)
        self.track = track
        stored = self.selection.param.detach()
        self.weight = stored.t() if self._transposed else stored
        self.weight_t = self.weight.t()
        self.open_forward()

    def select(self, y: Tensor) -> Tensor:
        """The selected columns of y (n, M, out): y itself, or a view (n, M, groups, length)."""
        return _select(y, self.selection.rows)

    # ------------------------------------------------------------------ one forward

    def open_forward(self) -> None:
        """Be ready to record a forward and its backward."""
        self._arrived = set()
        if self.lookups is not None:
            self.lookups.open_calls, self.lookups.arrived = {}, False

    def room_for_dy(self, deltas: slice, start: Start, count: int) -> Tensor | None:
        """Where the caller has to write dY (n, M, out) of a linear use, that is, a place for it.

        None where it takes more than that: :meth:`record_dy`.
        """
        if self.selection.rows is not None or start in self._arrived:
            return None
        place = self.dy.room(deltas, start, count)
        if place is not None:
            self._arrived.add(start)
        return place

    def record_dy(self, deltas: slice, start: Start, dy: Tensor) -> None:
        """Write dY (n, M, out) of a linear use, already 0 at padding; keep the selected columns."""
        selected = self.select(dy)
        selected = selected.flatten(2) if selected.dim() == 4 else selected
        # Two uses of the very same x share its rows, so their gradients add up.
        self.dy.write(deltas, start, selected, add=start in self._arrived)
        self._arrived.add(start)

    def close_forward(self, deltas: slice) -> bool:
        """Write zeros for uses that no gradient reached; return whether one was reached."""
        for start, count in self.inputs.calls if self.inputs is not None else ():
            if start not in self._arrived:
                self.dy.zero(deltas, start, count)
        lookups = self.lookups
        for start, count in lookups.open_calls.items() if lookups else ():
            lookups.dy.zero(deltas, start, count)
        return bool(self._arrived) or (lookups is not None and lookups.arrived)

    def uses(self, deltas: slice) -> Uses:
        """What the gradients of some deltas are made of in the step in progress."""
        pairs, lookup = [], None
        if self.inputs is not None and self.inputs.calls:
            start, count = _new_rows(self.inputs.rows, self.inputs.pending, deltas)
            xs, dys = (each.views(deltas, start, count) for each in (self.inputs.buffer, self.dy))
            pairs = list(zip(xs, dys, strict=True))
        if self.lookups is not None:
            start, count = _new_rows(self.lookups.rows, self.lookups.pending, deltas)
            ids = self.lookups.ids.at(deltas, start, count)[:, :, 0]
            lookup = ids, self.lookups.dy.at(deltas, start, count)
        return Uses(pairs, lookup)

    def blank(self, deltas: slice, where: Tensor) -> None:
        """Make the step's gradient 0 for the deltas of a slice for which ``where`` (n,) is true."""
        if self.inputs is not None:
            start, count = _new_rows(self.inputs.rows, self.inputs.pending, deltas)
            self.inputs.buffer.blank(deltas, start, count, where)
            self.dy.blank(deltas, start, count, where)
        if self.lookups is not None:
            start, count = _new_rows(self.lookups.rows, self.lookups.pending, deltas)
            self.lookups.dy.blank(deltas, start, count, where)

    def close_step(self) -> None:
        """The rows of the step in progress become part of the past."""
        if self.lookups is not None:
            self.lookups.rows = self.lookups.pending


class VectorFactors:
    """The gradients of a bias or a norm's weight: one row a step, in the compute type.

    Attributes:
        selection: the parameter.
        grads: (D, steps, selected).
        rows: which steps they belong to.
        track: the coefficients.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        param = selection.param.detach()
        self.base = param.to(compute_dtype(param.dtype))
        self.grads = RowBuffer(selection.view().numel(), self.base.dtype, param.device)
        self.track: Track | None = None
        self.current_leaf: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.grads.nbytes

    @property
    def buffers(self) -> list[RowBuffer]:
        """Where the gradients are."""
        return [self.grads]

    def begin(self, root: Rows, capacity: int, track: Track) -> None:
        """Start a session without rows."""
        self.grads.begin(len(root.lengths), capacity)
        self.rows = self.pending = root
        self.track = track
        # The weights may have been changed by their owner since the last prompt.
        self.base = self.selection.param.detach().to(self.base.dtype)
        self.open_forward()

    def effective(self, rho: Tensor | None, beta: Tensor, deltas: slice) -> Tensor:
        """ρ·w₀ − Σ β_s g_s for each delta of a slice, (n, size) in the compute type."""
        n = deltas.stop - deltas.start
        out = self.base.expand(n, -1).clone()
        selected = _select(out, self.selection.rows)
        if rho is not None:
            selected.mul_(rho.view(-1, *[1] * (selected.dim() - 1)))
        if beta.shape[1]:
            steps = self.grads.first(deltas, beta.shape[1])
            selected.sub_(torch.bmm(beta[:, None], steps).view(selected.shape))
        return out

    # ------------------------------------------------------------------ one forward

    def open_forward(self) -> None:
        """Be ready to record a forward and its backward."""
        self.current_leaf = None

    def leaf(self, effective: Tensor, step: int) -> Tensor:
        """The tensor (n, size) that stands for the parameter in the forward being recorded."""
        if self.current_leaf is None:
            self.current_leaf, self._step = effective.requires_grad_(), step
        return self.current_leaf

    def close_forward(self, deltas: slice) -> bool:
        """Keep the gradient that arrived; return whether one did."""
        grad = None if self.current_leaf is None else self.current_leaf.grad
        if grad is None:
            return False
        selected = _select(grad, self.selection.rows).flatten(1)
        self.grads.write(deltas, self.pending.start(deltas), selected[:, None])
        self.pending = self.pending.append(self._step, deltas, 1)
        return True

    def squared_norm(self, deltas: slice) -> Tensor:
        """‖g‖² of each delta for the step in progress, (n,) float64."""
        start, count = _new_rows(self.rows, self.pending, deltas)
        return self.grads.at(deltas, start, count).square().sum((1, 2), dtype=torch.float64)

    def blank(self, deltas: slice, where: Tensor) -> None:
        """Make the step's gradient 0 for the deltas of a slice for which ``where`` (n,) is true."""
        start, count = _new_rows(self.rows, self.pending, deltas)
        self.grads.blank(deltas, start, count, where)

    def close_step(self) -> None:
        """The row of the step in progress becomes part of the past."""
        self.rows = self.pending


@dataclass(eq=False)
class Track:
    """Parameters that share coefficients: one group, and a gradient in the same steps.

    Factors know their track and it does not know them: a cycle of references would keep their
    buffers, gigabytes, until Python next looks for cycles.

    Attributes:
        group: number of the parameter group, -1 for the default one.
        coefficients: of all deltas.
        decays: whether W₀'s own coefficient ρ can differ from 1.
    """

    group: int
    coefficients: Coefficients
    decays: bool

    def copy(self) -> Track:
        """The same, to be changed without this one."""
        return replace(self, coefficients=self.coefficients.clone())


Factors = MatrixFactors | VectorFactors


def of_track(factors: Sequence[Factors], track: Track) -> list[Factors]:
    """Those of a track, in their order."""
    return [each for each in factors if each.track is track]


def squared_norm(
    factors: Sequence[Factors],
    deltas: slice,
    device: torch.device,
    backend: str = "auto",
) -> Tensor:
    """Σ ‖G‖² of each delta over parameters that the step in progress reached, (n,) float64.

    Args:
        factors: of the parameters.
        deltas: which ones.
        device: of the result.
        backend: a setting for all ops of a run.
    """
    matrices = [each for each in factors if isinstance(each, MatrixFactors)]
    places = {each.weight.device.type for each in matrices}
    of_op = ops.backend_for("gram_norms", backend, *places)
    of_matrices = iter(ghost_norms([each.uses(deltas) for each in matrices], of_op))
    squares = [
        next(of_matrices) if isinstance(each, MatrixFactors) else each.squared_norm(deltas)
        for each in factors
    ]
    if not squares:
        return torch.zeros(deltas.stop - deltas.start, dtype=torch.float64, device=device)
    # One after the other: sum(0) would take an order that depends on the number of deltas.
    return torch.stack([square.to(device) for square in squares]).cumsum(0)[-1]


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """Products a b for (n, M, i) and (n, i, R); one alone is not sent through the batched code."""
    return torch.mm(a[0], b[0])[None] if a.shape[0] == 1 else torch.bmm(a, b)


def add_product_(y: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to y, (n, M, out) or, where columns are selected, (n, M, groups, length)."""
    if y.dim() == 4:
        y.add_(batched_product(a, b).view(y.shape))
    elif y.shape[0] == 1:
        y[0].addmm_(a[0], b[0])
    else:
        y.baddbmm_(a, b)


def _select(tensor: Tensor, rows: RowSlice | None) -> Tensor:
    """The selected entries of the last dimension, as a view with one more where there are rows."""
    if rows is None:
        return tensor
    return tensor.unflatten(-1, (-1, rows.period)).narrow(-1, rows.start, rows.length)


def _new_rows(rows: Rows, pending: Rows, deltas: slice) -> tuple[Start, int]:
    """Start and number of the rows that the step in progress has added for some deltas."""
    return rows.start(deltas), pending.lengths[deltas.start] - rows.lengths[deltas.start]
