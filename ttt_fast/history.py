"""Losses and gradient norms of a session's steps: left on the device, read by the host in bulk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class History:
    """What every step measured. A step writes on the device; only :meth:`read` waits for it.

    Args:
        n_deltas: D.
        dtype: of losses and norms.
        device: where the steps run.
    """

    def __init__(self, n_deltas: int, dtype: torch.dtype, device: torch.device) -> None:
        self._n_deltas, self._dtype, self._device = n_deltas, dtype, device
        self._unread: list[Tensor] = []  # rows that the host has not seen
        self._rows: list[Tensor] = []  # (2, D) of each step, on the host
        self._taken: list[tuple[int, ...]] = []
        self._n_checked = 0

    def open_step(self) -> Tensor:
        """A row of NaN on the device for losses and gradient norms, (2, D), to be filled."""
        shape = (2, self._n_deltas)
        return torch.full(shape, torch.nan, dtype=self._dtype, device=self._device)

    def close_step(self, row: Tensor, deltas: Sequence[int]) -> None:
        """Keep the row of a step, in which these deltas took part."""
        self._unread.append(row)
        self._taken.append(tuple(deltas))

    def unread(self) -> tuple[Tensor, list[tuple[int, ...]]]:
        """What all steps measured, (S, 2, D) on the device, while the host has seen none of it.

        With the deltas of each step: what :meth:`replace` takes.
        """
        return torch.stack(self._unread), list(self._taken)

    def replace(self, measured: Tensor, taken: Sequence[tuple[int, ...]]) -> None:
        """Have the steps of another history, instead of none."""
        self._unread, self._taken = list(measured), list(taken)

    def table(self) -> Tensor:
        """What all steps measured, (S, 2, D) on the host."""
        self.read()
        return torch.stack(self._rows)

    def read(self) -> None:
        """Copy what the host has not seen yet from the device, all at once."""
        if self._unread:
            self._rows += torch.stack(self._unread).cpu()
            self._unread = []

    def steps(self, delta: int) -> list[int]:
        """Numbers, from 1, of the steps in which a delta took part."""
        return [number for number, taken in enumerate(self._taken, 1) if delta in taken]

    def of(self, delta: int) -> tuple[Tensor, Tensor]:
        """Losses and gradient norms of the steps of a delta, (steps,) each, on the host."""
        self.read()
        rows = [self._rows[number - 1][:, delta] for number in self.steps(delta)]
        if not rows:
            return torch.empty(0, dtype=self._dtype), torch.empty(0, dtype=self._dtype)
        losses, norms = torch.stack(rows, dim=1)
        return losses, norms

    def first_not_finite(self) -> tuple[int, int, float, float] | None:
        """The first loss or norm that is not finite, among the steps not checked before.

        Returns:
            The delta's step, from 1, the delta, loss and norm; None if all is well.
        """
        self.read()
        for number in range(self._n_checked + 1, len(self._rows) + 1):
            finite = self._rows[number - 1].isfinite().all(0).tolist()
            for delta in self._taken[number - 1]:
                if not finite[delta]:
                    loss, norm = self._rows[number - 1][:, delta].tolist()
                    return self.steps(delta).index(number) + 1, delta, loss, norm
        self._n_checked = len(self._rows)
        return None
