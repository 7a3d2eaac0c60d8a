"""Clip and AdamW on all parameters of SmolLM2-135M: weight decay 0.01, clip 10."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.shapes import parameter_list
from ttt_fast import ops

OPTIONS = {"lr": 1e-5, "weight_decay": 0.01}
MAX_NORM = 10.0


def stock(dtype: torch.dtype, **options: bool) -> Callable[[], None]:
    """``clip_grad_norm_`` and ``torch.optim.AdamW.step``."""
    params = [torch.nn.Parameter(p) for p in parameter_list("SmolLM2-135M", dtype)]
    grads = parameter_list("SmolLM2-135M", dtype, scale=1e-3, seed=1)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = torch.optim.AdamW(params, **OPTIONS, **options)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def ours(dtype: torch.dtype) -> Callable[[], None]:
    """``ops.grad_norm`` and ``ops.adamw_``."""
    params = parameter_list("SmolLM2-135M", dtype)
    grads = parameter_list("SmolLM2-135M", dtype, scale=1e-3, seed=1)
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
def bench_clip_adamw(compare: Callable[..., None], dtype: torch.dtype) -> None:
    numel = sum(p.numel() for p in parameter_list("SmolLM2-135M", device="meta"))
    # Norm: read g. Update: read g, m, v, w and write m, v, w.
    moved = 8 * numel * dtype.itemsize
    sides = {
        "torch default": (stock(dtype), 0),
        "torch foreach": (stock(dtype, foreach=True), 0),
        "torch fused": (stock(dtype, fused=True), 0),
        "ours": (ours(dtype), moved),
    }
    compare(f"clip + AdamW, SmolLM2-135M, {dtype}", sides, baseline="torch default")
