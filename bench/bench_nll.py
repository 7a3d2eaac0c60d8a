"""Token losses and the gradient of SmolLM2-135M's logits: one prompt, and 16 at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bench.conftest import Sides, compiled
from bench.shapes import MODELS
from ttt_fast import ops

VOCABULARY = MODELS["SmolLM2-135M"].vocab


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [20, 320])
def bench_nll(compare: Callable[..., None], tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(tokens, VOCABULARY, generator=generator) * 4).to(dtype)
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    leaf = logits.clone().requires_grad_()

    def stock() -> torch.Tensor:
        """As transformers' loss functions do: in float32, through autograd."""
        leaf.grad = None
        losses = F.cross_entropy(leaf.float(), targets, reduction="none")
        losses.sum().backward()
        return losses.detach()

    # The op overwrites its logits, so that later rounds see gradients: as many exponentials of as
    # many numbers.
    overwritten = {name: logits.clone() for name in ("torch", "cpp")}
    expected = stock()
    for name, ours in overwritten.items():
        losses = ops.nll_(ours, targets, backend=name)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, leaf.grad, rtol=2e-2, atol=1e-6)
    moved = 2 * logits.nbytes
    sides: Sides = {
        "torch, F.cross_entropy": (stock, 0),
        "ours, reference": (lambda: ops.nll_(overwritten["torch"], targets, backend="torch"), 0),
        "ours": (lambda: ops.nll_(overwritten["cpp"], targets, backend="cpp"), moved),
    }
    sides |= compiled(stock)
    compare(f"nll, {tokens} x {VOCABULARY}, {dtype}", sides, baseline="torch, F.cross_entropy")
