"""Updates, norms and copies of one tensor, from 1 K to 1 G elements, as far as memory goes.

Small ones are what a call costs: 1024 of them are timed together up to 32 K elements. What fits
into the caches is faster than a copy of what does not: a share above 100 % is no error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.conftest import Sides, compiled, not_run
from bench.shapes import AMOUNT
from ttt_fast import ops

SIZES = {
    "quick": [1 << 10, 1 << 25],
    "full": [1 << n for n in (10, 12, 15, 17, 20, 22, 25, 27, 30)],
    "small": [1 << 10],
}[AMOUNT]
MAX_NORM, OPTIONS = 10.0, {"lr": 1e-5, "momentum": 0.9}
Run = Callable[[], Any]


def title(what: str, numel: int, dtype: torch.dtype) -> str:
    """Name of a group."""
    calls = f"{repeats(numel)} calls of " if repeats(numel) > 1 else ""
    return f"{what}, {calls}{numel} elements, {dtype}"


def repeats(numel: int) -> int:
    """Calls that are timed together."""
    if AMOUNT == "small":
        return 1
    return 1024 if numel <= 1 << 15 else 1


def often(run: Run, numel: int) -> Run:
    """Return a function that calls ``run`` as often as ``repeats`` says."""
    if repeats(numel) == 1:
        return run

    def calls() -> None:
        for _ in range(repeats(numel)):
            run()

    return calls


sizes = pytest.mark.parametrize("numel", SIZES)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@sizes
@dtypes
def bench_sgd_sizes(
    benchmark: Any, compare: Callable[..., None], numel: int, dtype: torch.dtype
) -> None:
    group = title("clip + SGD", numel, dtype)
    if not_run(benchmark, group, 4 * numel * dtype.itemsize):
        return
    weight, grad = torch.full((numel,), 0.02, dtype=dtype), torch.full((numel,), 1e-3, dtype=dtype)
    param = torch.nn.Parameter(weight)
    param.grad = grad
    momentum = torch.zeros_like(weight)

    def stock(**options: bool) -> Run:
        optimizer = torch.optim.SGD([param], **OPTIONS, **options)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_([param], MAX_NORM)
            optimizer.step()
            # One buffer serves all sides, as far as it goes: 1 G elements are 4 GB.
            optimizer.state[param]["momentum_buffer"] = momentum

        return often(step, numel)

    def ours() -> None:
        norm = ops.grad_norm([grad], backend="cpp")
        ops.sgd_(
            [weight], [grad], [momentum], grad_norm=norm, max_grad_norm=MAX_NORM, backend="cpp",
            **OPTIONS,
        )  # fmt: skip

    moved = 6 * numel * dtype.itemsize * repeats(numel)
    sides: Sides = {
        "torch default": (stock(foreach=False), moved),
        "torch foreach": (stock(foreach=True), moved),
        "ours": (often(ours, numel), moved),
    }
    if dtype == torch.float32:  # fused=True does nothing to bfloat16 weights on the CPU
        sides["torch fused"] = (stock(fused=True), moved)
    compare(group, sides, baseline="torch default")


@sizes
@dtypes
def bench_norm_sizes(
    benchmark: Any, compare: Callable[..., None], numel: int, dtype: torch.dtype
) -> None:
    group = title("grad_norm", numel, dtype)
    if not_run(benchmark, group, numel * dtype.itemsize):
        return
    grads = [torch.full((numel,), 1e-3, dtype=dtype)]
    moved = grads[0].nbytes * repeats(numel)

    def stock() -> torch.Tensor:
        return torch.nn.utils.get_total_norm(grads)

    sides: Sides = {
        "torch": (often(stock, numel), moved),
        "ours": (often(lambda: ops.grad_norm(grads, backend="cpp"), numel), moved),
    }
    sides |= compiled(often(stock, numel), moved) if repeats(numel) == 1 else {}
    compare(group, sides, baseline="torch")


@sizes
@dtypes
def bench_copy_sizes(
    benchmark: Any, compare: Callable[..., None], numel: int, dtype: torch.dtype
) -> None:
    group = title("copy", numel, dtype)
    if not_run(benchmark, group, 2 * numel * dtype.itemsize):
        return
    src = torch.ones(numel, dtype=dtype)
    dst = torch.zeros_like(src)
    moved = 2 * src.nbytes * repeats(numel)
    sides: Sides = {
        "torch": (often(lambda: dst.copy_(src), numel), moved),
        "torch foreach": (often(lambda: torch._foreach_copy_([dst], [src]), numel), moved),
        "ours": (often(lambda: ops.copy_([dst], [src], backend="cpp"), numel), moved),
    }
    compare(group, sides, baseline="torch")
