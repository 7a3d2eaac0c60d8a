"""Clip and SGD on all parameters of SmolLM2-135M: momentum 0.9, weight decay 0.01, clip 10."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.shapes import parameter_list
from ttt_fast import ops

OPTIONS = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 0.01}
MAX_NORM = 10.0


def stock(dtype: torch.dtype, **options: bool) -> Callable[[], None]:
    """``clip_grad_norm_`` and ``torch.optim.SGD.step``."""
    params = [torch.nn.Parameter(p) for p in parameter_list("SmolLM2-135M", dtype)]
    grads = parameter_list("SmolLM2-135M", dtype, scale=1e-3, seed=1)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = torch.optim.SGD(params, **OPTIONS, **options)
    # "fused" changes nothing about clipping, which is foreach or not.
    foreach = None if not options or "fused" in options else options["foreach"]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=foreach)
        optimizer.step()

    return step


def ours(dtype: torch.dtype, backend: str = "cpp", **options: str) -> Callable[[], None]:
    """``ops.grad_norm`` and ``ops.sgd_``."""
    params = parameter_list("SmolLM2-135M", dtype)
    grads = parameter_list("SmolLM2-135M", dtype, scale=1e-3, seed=1)
    buffers = [torch.zeros_like(p) for p in params]

    def step() -> None:
        norm = ops.grad_norm(grads, backend=backend)
        ops.sgd_(
            params, grads, buffers, grad_norm=norm, max_grad_norm=MAX_NORM, backend=backend,
            **OPTIONS, **options,
        )  # fmt: skip

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_clip_sgd(compare: Callable[..., None], dtype: torch.dtype) -> None:
    numel = sum(p.numel() for p in parameter_list("SmolLM2-135M", device="meta"))
    # Norm: read g. Update: read g, m, w and write m, w.
    moved = 6 * numel * dtype.itemsize
    sides = {
        "torch default": (stock(dtype), 0),
        "torch foreach": (stock(dtype, foreach=True), 0),
        "ours": (ours(dtype), moved),
    }
    if dtype == torch.float32:  # fused=True does nothing to bfloat16 weights on the CPU
        sides["torch fused"] = (stock(dtype, fused=True), 0)
    else:
        sides["ours, stochastic"] = (ours(dtype, rounding="stochastic"), moved)
    compare(f"clip + SGD, SmolLM2-135M, {dtype}", sides, baseline="torch default")
