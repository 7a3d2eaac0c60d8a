"""Clip and SGD on all parameters of models: momentum 0.9, weight decay 0.01, clip 10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.conftest import Sides, compiled, not_run
from bench.shapes import LISTS, parameter_count, parameter_list
from ttt_fast import ops

OPTIONS = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 0.01}
MAX_NORM = 10.0


def stock(model: str, dtype: torch.dtype, **options: bool) -> Callable[[], None]:
    """``clip_grad_norm_`` and ``torch.optim.SGD.step``."""
    params = [torch.nn.Parameter(p) for p in parameter_list(model, dtype)]
    grads = parameter_list(model, dtype, scale=1e-3, seed=1)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = torch.optim.SGD(params, **OPTIONS, **options)
    # "fused" changes nothing about clipping, which is foreach or not.
    foreach = None if not options or "fused" in options else options["foreach"]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=foreach)
        optimizer.step()

    return step


def ours(
    model: str, dtype: torch.dtype, backend: str = "cpp", **options: str
) -> Callable[[], None]:
    """``ops.grad_norm`` and ``ops.sgd_``."""
    params = parameter_list(model, dtype)
    grads = parameter_list(model, dtype, scale=1e-3, seed=1)
    buffers = [torch.zeros_like(p) for p in params]

    def step() -> None:
        norm = ops.grad_norm(grads, backend=backend)
        ops.sgd_(
            params, grads, buffers, grad_norm=norm, max_grad_norm=MAX_NORM, backend=backend,
            **OPTIONS, **options,
        )  # fmt: skip

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", LISTS)
def bench_clip_sgd(
    benchmark: Any, compare: Callable[..., None], model: str, dtype: torch.dtype
) -> None:
    group, n_bytes = f"clip + SGD, {model}, {dtype}", parameter_count(model) * dtype.itemsize
    # Parameters, gradients and momentum, one side after the other, each with its own.
    if not_run(benchmark, group, 5 * 3 * n_bytes):
        return
    # Norm: read g. Update: read g, m, w and write m, w.
    moved = 6 * n_bytes
    sides: Sides = {
        "torch default": (stock(model, dtype),),
        "torch foreach": (stock(model, dtype, foreach=True),),
        "ours": (ours(model, dtype), moved),
    }
    if dtype == torch.float32:  # fused=True does nothing to bfloat16 weights on the CPU
        sides["torch fused"] = (stock(model, dtype, fused=True),)
    else:
        sides["ours, stochastic"] = (ours(model, dtype, rounding="stochastic"), moved)
    sides |= compiled(stock(model, dtype))
    compare(group, sides, baseline="torch default")
