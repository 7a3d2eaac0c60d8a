"""Squared norms of the gradients of SmolLM2-135M's linear layers, from their factors, all layers.

One side forms each gradient, as a backward would, and takes its norm; one has its Gram matrices
from torch's products; the last is the op.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.conftest import Sides, compiled
from bench.shapes import MODELS
from ttt_fast import ops

MODEL = MODELS["SmolLM2-135M"]
REPEATS = 4  # blocks of the model that are measured; the head is measured by itself


def factor_pairs(
    batch: int, tokens: int, dtype: torch.dtype, head: bool
) -> list[tuple[Tensor, Tensor]]:
    """(x, dy) of each linear layer of some blocks, or of the head."""
    matrices = [s for s in MODEL.parameter_shapes() if len(s) == 2]
    shapes = matrices[:1] if head else matrices[1 : 1 + 7 * REPEATS]
    generator = torch.Generator().manual_seed(0)

    def random(width: int) -> Tensor:
        return torch.randn(batch, tokens, width, generator=generator).to(dtype)

    return [(random(width), random(out)) for out, width in shapes]


def plain(x: Tensor, dy: Tensor) -> Tensor:
    """The formula in torch's own operations."""
    return ((dy @ dy.mT).float() * (x @ x.mT).float()).sum((1, 2))


def formed(x: Tensor, dy: Tensor) -> Tensor:
    """Norms of the gradients, which are made for it one delta after the other."""
    return torch.stack([(g.t().mm(h)).float().square().sum() for h, g in zip(x, dy, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("head", [False, True], ids=["blocks", "head"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 20), (1, 64), (16, 20)])
def bench_gram_norm(
    compare: Callable[..., None], batch: int, tokens: int, head: bool, dtype: torch.dtype
) -> None:
    pairs = factor_pairs(batch, tokens, dtype, head)
    for x, dy in pairs[:7]:
        expected = (dy.double().mT @ x.double()).square().sum((1, 2)) if not head else None
        results = [ops.gram_norm(x, dy, backend=name).double() for name in ("torch", "cpp")]
        for result in results:
            torch.testing.assert_close(result, results[0], rtol=1e-5, atol=0)
            if expected is not None:
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)
    moved = sum(t.nbytes for pair in pairs for t in pair)
    operations = 2 * tokens * sum(t.numel() for pair in pairs for t in pair)

    lists = list(zip(*pairs, strict=True))

    def grams() -> list[Tensor]:
        return [ops.gram_norm(*p, backend="torch") for p in pairs]

    sides: Sides = {
        "torch, Grams": (grams, moved, operations),
        "ours": (lambda: ops.gram_norms(*lists, backend="cpp"), moved, operations),
    }
    if not head:
        sides["gradients formed"] = (lambda: [formed(*p) for p in pairs],)
    sides |= compiled(lambda: [plain(*p) for p in pairs], moved, operations)
    where = "head" if head else f"{REPEATS} blocks"
    compare(
        f"gram_norm, {where}, B = {batch}, M = {tokens}, {dtype}", sides, baseline="torch, Grams"
    )
