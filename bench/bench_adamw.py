"""Clip and AdamW on all parameters of models: weight decay 0.01, clip 10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.conftest import Sides, compiled, not_run
from bench.shapes import LISTS, parameter_count, parameter_list
from ttt_fast import ops

OPTIONS = {"lr": 1e-5, "weight_decay": 0.01}
MAX_NORM = 10.0


def stock(model: str, dtype: torch.dtype, **options: bool) -> Callable[[], None]:
    """``clip_grad_norm_`` and ``torch.optim.AdamW.step``."""
    params = [torch.nn.Parameter(p) for p in parameter_list(model, dtype)]
    grads = parameter_list(model, dtype, scale=1e-3, seed=1)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = torch.optim.AdamW(params, **OPTIONS, **options)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def ours(model: str, dtype: torch.dtype) -> Callable[[], None]:
    """``ops.grad_norm`` and ``ops.adamw_``."""
    params = parameter_list(model, dtype)
    grads = parameter_list(model, dtype, scale=1e-3, seed=1)
    exp_avgs = [torch.zeros_like(p) for p in params]
    exp_avg_sqs = [torch.zeros_like(p) for p in params]
    step_index = 0

    def step() -> None:
        nonlocal step_index
        step_index += 1
        norm = ops.grad_norm(grads, backend="cpp")
        ops.adamw_(
            params, grads, exp_avgs, exp_avg_sqs, step_index=step_index, grad_norm=norm,
            max_grad_norm=MAX_NORM, backend="cpp", **OPTIONS,
        )  # fmt: skip

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", LISTS)
def bench_clip_adamw(
    benchmark: Any, compare: Callable[..., None], model: str, dtype: torch.dtype
) -> None:
    group, n_bytes = f"clip + AdamW, {model}, {dtype}", parameter_count(model) * dtype.itemsize
    # Parameters, gradients and two moments of each side.
    if not_run(benchmark, group, 5 * 4 * n_bytes):
        return
    sides: Sides = {
        "torch default": (stock(model, dtype),),
        "torch foreach": (stock(model, dtype, foreach=True),),
        "torch fused": (stock(model, dtype, fused=True),),
        # Norm: read g. Update: read g, m, v, w and write m, v, w.
        "ours": (ours(model, dtype), 8 * n_bytes),
    }
    sides |= compiled(stock(model, dtype))
    compare(group, sides, baseline="torch default")
