"""W <- W - dy' diag(beta) x on the matrices of blocks of SmolLM2-135M and on its embedding.

The baseline forms the gradient in the weight's dtype, as a backward does, and adds it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.conftest import Sides, compiled
from bench.shapes import AMOUNT, MODELS
from ttt_fast import ops

MODEL = MODELS["SmolLM2-135M"]
REPEATS = 2  # blocks of the model that are measured, beside the embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [20, 200])
def bench_rank_update(compare: Callable[..., None], rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = [s for s in MODEL.parameter_shapes() if len(s) == 2][: 1 + 7 * REPEATS]
    cases = [
        ((random(*s) * 0.02).to(dtype), random(rank, s[1]).to(dtype), random(rank, s[0]).to(dtype))
        for s in shapes
    ]
    beta = -1e-6 * torch.rand(rank, generator=generator)
    narrow = beta.to(dtype)[:, None]

    def stock() -> None:
        for weight, x, dy in cases:
            weight.add_((dy * narrow).t().mm(x))

    def ours(**options: str) -> None:
        for weight, x, dy in cases:
            ops.rank_update_(weight, x, dy, beta, **options)

    for weight, x, dy in cases[1:8]:
        exact = weight.double() + (dy.double().t() * beta.double()) @ x.double()
        actual = weight.clone()
        ops.rank_update_(actual, x, dy, beta)
        torch.testing.assert_close(actual.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-8)
    moved = 2 * sum(weight.nbytes for weight, _, _ in cases)
    operations = 2 * rank * sum(weight.numel() for weight, _, _ in cases)
    sides: Sides = {
        "torch, gradient formed": (stock, moved, operations),
        "ours": (ours, moved, operations),
    }
    sides |= compiled(stock, moved, operations)
    if dtype == torch.bfloat16 and AMOUNT != "quick":  # 2 to 3 s each on a CPU: plain torch
        stochastic = partial(ours, rounding="stochastic")
        sides["ours, stochastic"] = (stochastic, moved, operations)
    group = f"rank_update, embedding and {REPEATS} blocks, R = {rank}, {dtype}"
    compare(group, sides, baseline="torch, gradient formed", dtype=dtype)
