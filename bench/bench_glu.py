"""Gated units of SmolLM2-135M's feed-forward layers, forward and backward: 30 layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bench.conftest import Sides, compiled
from bench.shapes import MODELS
from ttt_fast import ops

MODEL = MODELS["SmolLM2-135M"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [20, 320])
def bench_glu(compare: Callable[..., None], tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (tokens, MODEL.intermediate)
    gate, up, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]

    def stock() -> tuple[torch.Tensor, ...]:
        y = F.silu(leaves[0]) * leaves[1]
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    def ours() -> tuple[torch.Tensor, ...]:
        y = ops.glu(gate, up, backend="cpp")
        return y, *ops.glu_backward(dy, gate, up, backend="cpp")

    for actual, expected in zip(ours(), stock(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    # Forward: read gate and up, write y. Backward: read dy, gate and up, write dgate and dup.
    moved = 8 * gate.nbytes * MODEL.layers

    def layers(run: Callable[[], object]) -> Callable[[], object]:
        return lambda: [run() for _ in range(MODEL.layers)]

    sides: Sides = {
        "torch, silu and product": (layers(stock), moved),
        "ours": (layers(ours), moved),
    }
    sides |= compiled(layers(stock), moved)
    compare(f"glu, {tokens} tokens, {dtype}", sides, baseline="torch, silu and product")
