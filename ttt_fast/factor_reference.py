"""The ops on a gradient kept as its factors, in plain torch: norms, products, sums.

What :mod:`ttt_fast.reference` says of arithmetic holds here; callers find these functions there,
too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_fast.rounding import compute_dtype, random_bits, round_stochastic

# rank_update_ works on this many elements of the weight at a time.
RANK_UPDATE_ELEMENTS = 1 << 20


def gram_norm(x: Tensor, dy: Tensor) -> Tensor:
    """See :func:`ttt_fast.ops.gram_norm`."""
    x, dy = x.to(compute_dtype(x.dtype)), dy.to(compute_dtype(dy.dtype))
    squared = (torch.bmm(x, x.mT) * torch.bmm(dy, dy.mT)).sum((1, 2))
    # Tokens that cancel each other leave rounding errors of either sign.
    return squared.clamp_(min=0.0)


def gram_norms(xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Tensor:
    """See :func:`ttt_fast.ops.gram_norms`."""
    return torch.stack([gram_norm(x, dy) for x, dy in zip(xs, dys, strict=True)])


def delta_linear(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    d: Tensor,
    beta: Tensor,
    rho: Tensor | None = None,
    append: Tensor | None = None,
) -> Tensor:
    """See :func:`ttt_fast.ops.delta_linear`."""
    if append is not None:
        append.copy_(x)
    batch, tokens, width = x.shape
    wide = compute_dtype(x.dtype)
    if weight is None:
        y = x.new_zeros(batch, tokens, d.shape[2], dtype=wide)
    else:
        y = x.reshape(batch * tokens, width).to(wide).mm(weight.t().to(wide))
        y = y.view(batch, tokens, -1)
    if rho is not None:
        y.mul_(rho[:, None, None])
    beta, a, d = beta.to(wide), a.to(wide), d.to(wide)
    if batch == 1:  # faster as matrices than as a batch
        y[0].addmm_(x[0].to(wide).mm(a[0].t()).mul_(beta[0]), d[0], alpha=-1)
    else:
        y.baddbmm_(x.to(wide).bmm(a.mT).mul_(beta[:, None]), d, alpha=-1)
    return y.to(x.dtype)


def rank_update_(
    weight: Tensor,
    x: Tensor,
    dy: Tensor,
    beta: Tensor,
    *,
    scale: float = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """See :func:`ttt_fast.ops.rank_update_`, which checks the arguments."""
    wide = compute_dtype(weight.dtype)
    width = weight.shape[-1]
    scaled = x.to(wide) * beta.to(wide)[:, None]
    rows = max(1, RANK_UPDATE_ELEMENTS // max(1, width))
    first = 0
    for group in weight if weight.dim() == 3 else (weight,):
        for block in group.split(rows):
            columns = dy[:, first : first + block.shape[0]].to(wide)
            if weight.dtype == wide:
                block.addmm_(columns.t(), scaled, beta=scale)
            else:
                target = columns.t().mm(scaled).add_(block, alpha=scale)
                if rounding == "stochastic":
                    bits = random_bits(seed, 0, block.numel(), block.device, first * width)
                    target = round_stochastic(target, weight.dtype, bits)
                block.copy_(target)
            first += block.shape[0]
