"""Rows of factors: where those of all steps lie, and which step each of them belongs to.

They lie one behind the other in buffers (D, rows, width) and never change once a step is over.
Which step a row belongs to is the same for most buffers, so it is kept once, in :class:`Rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

Start = int | tuple[int, ...]  # first row of a write: one number for all deltas, or one each


class Rows:
    """Which step each row of a buffer belongs to, for every delta. Immutable.

    Buffers that were written alike share the object: :meth:`append` gives the same successor for
    the same step, deltas and count. So what is computed from it (coefficients of the rows) is
    computed once.

    Attributes:
        lengths: rows of each delta.
    """

    def __init__(self, n_deltas: int) -> None:
        self.lengths = (0,) * n_deltas
        self._origin: tuple[Rows, int, slice, int] | None = None  # what was appended to what
        self._successors: dict[tuple[int, int, int, int], Rows] = {}
        self._columns: Tensor | None = None

    def append(self, step: int, deltas: slice, count: int) -> Rows:
        """These rows and ``count`` more of step ``step`` for the deltas of a slice."""
        entry = (step, deltas.start, deltas.stop, count)
        if entry not in self._successors:
            successor = Rows(len(self.lengths))
            successor.lengths = tuple(
                length + count if deltas.start <= d < deltas.stop else length
                for d, length in enumerate(self.lengths)
            )
            successor._origin = self, step, deltas, count
            self._successors[entry] = successor
        return self._successors[entry]

    def longest(self, deltas: slice) -> int:
        """Rows that a product over these deltas has to cover."""
        return max(self.lengths[deltas])

    def start(self, deltas: slice) -> Start:
        """Where the next rows of these deltas begin: one number, or one each where they differ."""
        lengths = self.lengths[deltas]
        return lengths[0] if len(set(lengths)) == 1 else lengths

    def columns(self, device: torch.device) -> Tensor:
        """(D, longest) step of each row; -1 behind the rows of a shorter delta."""
        if self._columns is None:
            appended, rows = [], self
            while rows._columns is None and rows._origin is not None:
                appended.append(rows._origin)
                rows = rows._origin[0]
            shape = len(self.lengths), max(self.lengths)
            # Filled on the device: a table from the host would be an upload in every step.
            table = torch.full(shape, -1, dtype=torch.int64, device=device)
            if rows._columns is not None:
                table[:, : rows._columns.shape[1]] = rows._columns
            for earlier, step, deltas, count in reversed(appended):
                start = earlier.start(deltas)
                if isinstance(start, int):
                    table[deltas, start : start + count].fill_(step)
                else:
                    for d, first in zip(range(deltas.start, deltas.stop), start, strict=True):
                        table[d, first : first + count].fill_(step)
            self._columns, self._origin = table, None
        return self._columns


class RowBuffer:
    """Rows of D deltas, (D, capacity, width), written in place. Its memory outlives a prompt.

    Args:
        width: entries of a row.
        dtype: of the rows.
        device: of the rows.

    Attributes:
        filled: rows of the delta that has most.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width
        self._storage = torch.empty(0, dtype=dtype, device=device)
        self._data = self._storage.view(0, 0, width)
        self.filled = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._storage.nbytes

    @property
    def memory(self) -> Tensor:
        """All rows, written or not, (D, capacity, width)."""
        return self._data

    def begin(self, n_deltas: int, capacity: int) -> None:
        """Forget the rows; make room for ``capacity`` of each delta where there is not enough.

        All memory there is belongs to the deltas: what needed more than it asked for in one session
        finds it in the next, at the same addresses.
        """
        capacity = max(capacity, self._storage.numel() // max(1, n_deltas * self.width))
        numel = n_deltas * capacity * self.width
        if self._storage.numel() < numel:
            self._storage = self._storage.new_empty(numel)
        self._data = self._storage[:numel].view(n_deltas, capacity, self.width)
        self.filled = 0

    def at(self, deltas: slice, start: Start, count: int) -> Tensor:
        """``count`` rows of some deltas from ``start`` on, (n, count, width).

        A view to write to where all start at the same row, otherwise a copy.
        """
        views = self.views(deltas, start, count)
        return views[0] if len(views) == 1 else torch.cat(views)

    def views(self, deltas: slice, start: Start, count: int) -> list[Tensor]:
        """The rows of :meth:`at` where they lie: all deltas in one view, or one view each."""
        if isinstance(start, int):
            return [self._data[deltas, start : start + count]]
        pieces = zip(range(deltas.start, deltas.stop), start, strict=True)
        return [self._data[d : d + 1, s : s + count] for d, s in pieces]

    def room(self, deltas: slice, start: Start, count: int) -> Tensor | None:
        """Make room for rows; return their place, (n, count, width), where that is one view."""
        self._reserve(deltas, start, count)
        return self._data[deltas, start : start + count] if isinstance(start, int) else None

    def write(self, deltas: slice, start: Start, rows: Tensor, add: bool = False) -> None:
        """Write rows (n, count, width), or add them to what is there."""
        count = rows.shape[1]
        place = self.room(deltas, start, count)
        if place is not None:
            pairs = [(place, rows)]
        else:
            places = [
                self._data[d, s : s + count]
                for d, s in zip(range(deltas.start, deltas.stop), start, strict=True)
            ]
            pairs = zip(places, rows, strict=True)
        for target, source in pairs:
            target.add_(source) if add else target.copy_(source)

    def zero(self, deltas: slice, start: Start, count: int) -> None:
        """Write rows of zeros."""
        shape = (deltas.stop - deltas.start, count, self.width)
        self.write(deltas, start, self._storage.new_zeros(()).expand(shape))

    def blank(self, deltas: slice, start: Start, count: int, where: Tensor) -> None:
        """Write zeros to the rows of the deltas for which ``where`` (n,) is true."""
        if isinstance(start, int):
            self._data[deltas, start : start + count].masked_fill_(where[:, None, None], 0)
            return
        for i, first in enumerate(start):
            rows = self._data[deltas.start + i, first : first + count]
            rows.masked_fill_(where[i], 0)

    def first(self, deltas: slice, count: int) -> Tensor:
        """The first ``count`` rows of some deltas, a view (n, count, width)."""
        everyone = deltas.stop - deltas.start == self._data.shape[0]
        return (self._data if everyone else self._data[deltas]).narrow(1, 0, count)

    def _reserve(self, deltas: slice, start: Start, count: int) -> None:
        """Make room, and see to it that no delta has rows that nobody wrote."""
        end = (start if isinstance(start, int) else max(start)) + count
        n_deltas, capacity, _ = self._data.shape
        if end > capacity:
            old = self._data[:, : self.filled]
            self._storage = self._storage.new_empty(n_deltas * max(2 * capacity, end) * self.width)
            self._data = self._storage.view(n_deltas, -1, self.width)
            self._data[:, : self.filled].copy_(old)
        if end > self.filled:
            everyone = isinstance(start, int) and deltas.stop - deltas.start == n_deltas
            if not everyone:
                # A shorter delta's coefficients are 0 there, and 0 times NaN is not 0.
                self._data[:, self.filled : end].zero_()
            self.filled = end
