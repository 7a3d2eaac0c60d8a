"""Root mean square norms of SmolLM2-135M, forward and backward: 61 layers, one delta or four."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bench.conftest import Sides, compiled
from bench.shapes import MODELS
from ttt_fast import ops

MODEL, EPS = MODELS["SmolLM2-135M"], 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 20), (4, 64)])
def bench_rms_norm(
    compare: Callable[..., None], batch: int, tokens: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, tokens, MODEL.hidden)
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(batch, MODEL.hidden, generator=generator)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]

    def stock() -> tuple[torch.Tensor, ...]:
        """As transformers' models do: in float32, through autograd."""
        normed = F.rms_norm(leaves[0].float(), (MODEL.hidden,), eps=EPS)
        y = (normed * leaves[1][:, None]).to(dtype)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    def ours() -> tuple[torch.Tensor, ...]:
        y, rstd = ops.rms_norm(x, weight, eps=EPS, backend="cpp")
        return y, *ops.rms_norm_backward(dy, x, weight, rstd, backend="cpp")

    for actual, expected in zip(ours(), stock(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    count = 2 * MODEL.layers + 1
    # Forward: read x, write y. Backward: read dy and x, write dx.
    moved = 5 * x.nbytes * count

    def layers(run: Callable[[], object]) -> Callable[[], object]:
        return lambda: [run() for _ in range(count)]

    sides: Sides = {"torch": (layers(stock), moved), "ours": (layers(ours), moved)}
    sides |= compiled(layers(stock), moved)
    compare(f"rms_norm, {batch} x {tokens} tokens, {dtype}", sides, baseline="torch")
