"""Gradients of SmolLM2-135M's attention, in its 30 layers: torch's backward beside ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import Sides
from bench.shapes import MODELS
from ttt_fast import ops

MODEL = MODELS["SmolLM2-135M"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("prompts,tokens", [(1, 20), (16, 20), (1, 64), (1, 256)])
def bench_attention_backward(
    compare: Callable[..., None], prompts: int, tokens: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        """As projections have them, (B, T, H, D), seen as (B, H, T, D)."""
        shape = (prompts, tokens, heads, MODEL.head_dim)
        return torch.randn(shape, generator=generator).to(dtype).transpose(1, 2)

    leaves = [random(heads).requires_grad_() for heads in (MODEL.heads, *[MODEL.kv_heads] * 2)]
    dy = random(MODEL.heads)
    y = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    states = [x.detach() for x in leaves]
    scale = MODEL.head_dim**-0.5

    def stock() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def ours() -> tuple[Tensor, ...]:
        return ops.attention_backward(dy, *states, scale=scale, causal=True, backend="cpp")

    for actual, expected in zip(ours(), stock(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    # Queries, keys, values and dy are read, three gradients written.
    moved = 2 * sum(x.nbytes for x in leaves) * MODEL.layers + dy.nbytes * MODEL.layers

    def layers(run: Callable[[], object]) -> Callable[[], object]:
        return lambda: [run() for _ in range(MODEL.layers)]

    sides: Sides = {"torch": (layers(stock), moved), "ours": (layers(ours), moved)}
    what = f"attention backward, {prompts} x {tokens} tokens, {dtype}"
    compare(what, sides, baseline="torch")
