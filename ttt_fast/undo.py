"""The undo log: what updates overwrote in 16-bit weights, to be written back."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_fast.reference import UNDO_CHUNK


class UndoLog:
    """Sparse, bit-exact log of what updates overwrote in 16-bit weights.

    A changed element costs 6 bytes (32-bit index, 16-bit old value) each time it changes. The
    weights are divided into runs of 65536; once more than a third of a run has been logged, the run
    is kept whole (2 bytes an element) and logged no further. Memory is reserved for the worst case
    but touched only as it is used.

    Args:
        params: the weights, contiguous order of each view; only 16-bit ones are tracked.

    Attributes:
        offsets: element offset of each parameter in the log, -1 where it is not tracked.
        tensors: [index, value, cursor, counts, paged, pages], the state that the ops write.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.offsets: list[int] = []
        run_lengths: list[int] = []
        capacity = n_chunks = 0
        for param in params:
            if param.element_size() != 2:
                self.offsets.append(-1)
                continue
            self.offsets.append(n_chunks * UNDO_CHUNK)
            full, rest = divmod(param.numel(), UNDO_CHUNK)
            run_lengths += [UNDO_CHUNK] * full + [rest] * (rest > 0)
            n_chunks += full + (rest > 0)
            capacity += full * (UNDO_CHUNK // 3) + rest // 3
        if n_chunks * UNDO_CHUNK > 1 << 32:
            raise ValueError(
                f"UndoLog: {n_chunks * UNDO_CHUNK} elements are more than its 32-bit index can"
                " name; use where='device' or 'host'."
            )
        device = params[0].device if params else torch.device("cpu")
        self.tensors: list[Tensor] = [
            torch.empty(capacity, dtype=torch.int32, device=device),
            torch.empty(capacity, dtype=torch.int16, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(n_chunks, dtype=torch.int32, device=device),
            torch.zeros(n_chunks, dtype=torch.uint8, device=device),
            torch.empty(n_chunks * UNDO_CHUNK, dtype=torch.int16, device=device),
        ]
        self._run_lengths = torch.tensor(run_lengths, dtype=torch.int64)

    def select(self, indices: Sequence[int | None]) -> UndoLog:
        """The same log for another list of tensors: the i-th is this log's ``indices[i]``-th.

        Args:
            indices: positions in this log; None for a tensor that is not tracked. One may come
                twice (a weight that is listed twice).

        Returns:
            A log that shares ``tensors`` with this one and has its own ``offsets``.
        """
        log = copy.copy(self)
        log.offsets = [-1 if i is None else self.offsets[i] for i in indices]
        return log

    def reset(self) -> None:
        """Forget everything that was logged."""
        for tensor in self.tensors[2:5]:
            tensor.zero_()

    @property
    def entries(self) -> int:
        """Logged elements."""
        return int(self.tensors[2])

    @property
    def paged_chunks(self) -> int:
        """Runs that are kept whole."""
        return int(self.tensors[4].sum())

    @property
    def nbytes(self) -> int:
        """Bytes in use: entries, whole runs and the tables."""
        _, _, cursor, counts, paged, _ = self.tensors
        tables = cursor.nbytes + counts.nbytes + paged.nbytes
        whole = int((paged.cpu() * self._run_lengths).sum())
        return 6 * self.entries + 2 * whole + tables
