"""Snapshot and restore of all parameters of models, there and back; checksums; the undo log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.conftest import compiled, not_run
from bench.shapes import LISTS, parameter_count, parameter_list
from ttt_fast import Snapshot, ops

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@DTYPES
@pytest.mark.parametrize("model", LISTS)
def bench_there_and_back(
    benchmark: Any, compare: Callable[..., None], model: str, dtype: torch.dtype
) -> None:
    group, n_bytes = (
        f"snapshot + restore, {model}, {dtype}",
        parameter_count(model) * dtype.itemsize,
    )
    if not_run(benchmark, group, 4 * n_bytes):
        return
    params = parameter_list(model, dtype)
    module = torch.nn.ParameterList([torch.nn.Parameter(p.clone()) for p in params])
    saved = [torch.empty_like(p) for p in params]
    moved = 4 * n_bytes

    def clone_and_load() -> None:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(state)

    def foreach() -> None:
        torch._foreach_copy_(saved, params)
        torch._foreach_copy_(params, saved)

    def ours() -> None:
        ops.copy_(saved, params, backend="cpp")
        ops.copy_(params, saved, backend="cpp")

    sides = {
        "clone + load_state_dict": (clone_and_load, moved),
        "preallocated foreach_copy_": (foreach, moved),
        "ours": (ours, moved),
    }
    sides |= compiled(foreach, moved)
    compare(group, sides, baseline="clone + load_state_dict")


def bench_checksum(compare: Callable[..., None]) -> None:
    params = parameter_list("SmolLM2-135M")
    moved = sum(p.nbytes for p in params)
    sides = {
        "reference": (lambda: ops.checksum(params, backend="torch"), moved),
        "ours": (lambda: ops.checksum(params, backend="cpp"), moved),
    }
    compare("checksum, SmolLM2-135M, float32", sides, baseline="reference")


def bench_undo(compare: Callable[..., None]) -> None:
    """A small step and back: what it overwrote is logged, beside a copy of all weights."""
    grads = parameter_list("SmolLM2-135M", torch.bfloat16, scale=1e-3, seed=1)
    copied, logged = (parameter_list("SmolLM2-135M", torch.bfloat16) for _ in range(2))
    saved, snapshot = [p.clone() for p in copied], Snapshot(logged, where="undo")

    def with_copy() -> None:
        ops.sgd_(copied, grads, lr=1e-3, backend="cpp")
        ops.copy_(copied, saved, backend="cpp")

    def with_log() -> None:
        ops.sgd_(logged, grads, lr=1e-3, undo=snapshot.undo, backend="cpp")
        snapshot.restore()
        snapshot.take()

    with_copy()
    with_log()
    assert all(torch.equal(a, b) for a, b in zip(copied, logged, strict=True))
    sides = {"ours, copied": (with_copy,), "ours": (with_log,)}
    compare("step + undo, SmolLM2-135M, bfloat16", sides, baseline="ours, copied")
