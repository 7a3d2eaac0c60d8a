"""The linear layers of blocks of SmolLM2-135M with a delta of R past tokens, forward and backward.

Beside it: the frozen layers alone, which is what any method has to pay, and the same formula
written one operation after the other on concatenated factors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.conftest import compiled
from bench.shapes import MODELS
from ttt_fast import ops

MODEL = MODELS["SmolLM2-135M"]
REPEATS = 2  # blocks of the model that are measured


def plain(x: Tensor, weight: Tensor, a: Tensor, d: Tensor, beta: Tensor) -> Tensor:
    """The formula, an operation after the other."""
    return x @ weight.t() - ((x @ a.mT) * beta[:, None]).to(x.dtype) @ d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("batch", "tokens", "steps"), [(1, 20, 3), (1, 20, 10), (16, 20, 3)])
def bench_delta_linear(
    compare: Callable[..., None], batch: int, tokens: int, steps: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rank, space = steps * tokens, 10 * tokens
    calls, plain_calls, frozen = [], [], []
    shapes = [s for s in MODEL.parameter_shapes() if len(s) == 2][1 : 1 + 7 * REPEATS]
    for out, width in shapes:
        weight = random(out, width) * 0.02
        a, d = random(batch, space, width), random(batch, space, out) * 0.01
        beta = torch.rand(batch, rank, generator=generator) * 0.01
        x, dy = random(batch, tokens, width), random(batch, tokens, out)
        calls.append((x, weight, a[:, :rank], d[:, :rank], beta))
        calls.append((dy, weight.t(), d[:, :rank], a[:, :rank], beta))
        # Concatenation is not counted here.
        whole = (a[:, :rank].contiguous(), d[:, :rank].contiguous())
        plain_calls += [(x, weight, *whole, beta), (dy, weight.t(), *whole[::-1], beta)]
        frozen += [(x, weight), (dy, weight.t())]
    for call, other in zip(calls[:14], plain_calls, strict=False):
        torch.testing.assert_close(ops.delta_linear(*call), plain(*other), rtol=3e-2, atol=3e-2)
    # Forward and backward read every weight and every number of the factors once each.
    weights = 2 * sum(out * width for out, width in shapes)
    factors = 2 * batch * rank * sum(out + width for out, width in shapes)
    moved = dtype.itemsize * (weights + factors)
    operations = 2 * tokens * (batch * weights + factors)

    def formula() -> list[Tensor]:
        return [plain(*call) for call in plain_calls]

    sides = {
        "frozen layers": (
            lambda: [x @ weight.t() for x, weight in frozen],
            dtype.itemsize * weights,
            2 * tokens * batch * weights,
        ),
        "plain torch": (formula, moved, operations),
        "ours": (lambda: [ops.delta_linear(*call) for call in calls], moved, operations),
    }
    sides |= compiled(formula, moved, operations)
    group = f"delta_linear, {REPEATS} blocks, B = {batch}, M = {tokens}, R = {rank}, {dtype}"
    compare(group, sides, baseline="plain torch", dtype=dtype)
