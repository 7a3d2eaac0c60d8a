"""What a GPU does not promise, or does not forgive, and the interpreter does.

It runs programs in ascending order, so that a kernel which reads what another program writes looks
right; and it takes no notice of an alignment hint that is not true, which on a GPU is a crash.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_set_grid_dim = InterpreterBuilder.set_grid_dim
_set_grid_idx = InterpreterBuilder.set_grid_idx
_set_attr = TensorHandle.set_attr


@contextmanager
def program_order(seed: int | None) -> Iterator[None]:
    """Run the programs of every launch in an order that depends on the seed; None: ascending."""
    order: dict[tuple[int, ...], tuple[int, ...]] = {}

    def set_grid_dim(self: InterpreterBuilder, *sizes: int) -> None:
        _set_grid_dim(self, *sizes)
        places = list(itertools.product(*map(range, sizes)))
        programs = places.copy()
        if seed is not None:
            random.Random(seed).shuffle(programs)
        order.clear()
        order.update(zip(places, programs, strict=True))

    def set_grid_idx(self: InterpreterBuilder, *place: int) -> None:
        _set_grid_idx(self, *order[place])

    before = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    InterpreterBuilder.set_grid_dim = set_grid_dim
    InterpreterBuilder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx = before


def check_hints() -> None:
    """Let ``tl.multiple_of`` fail, from now on, where the value is none."""

    def set_attr(self: TensorHandle, key: str, values: Any) -> None:
        first = int(np.ravel(self.data)[0])
        if key == "tt.divisibility" and first % values[0] != 0:
            raise ValueError(f"tl.multiple_of({self.dtype}, {values}), but the value is {first:#x}")
        _set_attr(self, key, values)

    TensorHandle.set_attr = set_attr
