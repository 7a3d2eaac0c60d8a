"""Rotary positions of SmolLM2-135M's queries and keys, forward and backward: 30 layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.conftest import Sides, compiled
from bench.shapes import MODELS
from ttt_fast import ops

MODEL = MODELS["SmolLM2-135M"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [20, 320])
def bench_rotary(compare: Callable[..., None], tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        """As projections have them, (B, T, H, D), seen as (B, H, T, D)."""
        shape = (1, tokens, heads, MODEL.head_dim)
        return torch.randn(shape, generator=generator).to(dtype).transpose(1, 2)

    query, key, dquery, dkey = map(random, (MODEL.heads, MODEL.kv_heads) * 2)
    angles = torch.rand(1, tokens, MODEL.head_dim // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]

    def stock() -> tuple[Tensor, ...]:
        turned = apply_rotary_pos_emb(*leaves, cos, sin)
        return *turned, *torch.autograd.grad(turned, leaves, (dquery, dkey))

    def ours() -> tuple[Tensor, ...]:
        forward = [ops.rotary(x, cos, sin, backend="cpp") for x in (query, key)]
        backward = (ops.rotary(x, cos, sin, transposed=True, backend="cpp") for x in (dquery, dkey))
        return *forward, *backward

    for actual, expected in zip(ours(), stock(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    # Read and written, forward and backward.
    moved = 4 * (query.nbytes + key.nbytes) * MODEL.layers

    def layers(run: Callable[[], object]) -> Callable[[], object]:
        return lambda: [run() for _ in range(MODEL.layers)]

    sides: Sides = {"torch, transformers": (layers(stock), moved), "ours": (layers(ours), moved)}
    sides |= compiled(layers(stock), moved)
    compare(f"rotary, {tokens} tokens, {dtype}", sides, baseline="torch, transformers")
