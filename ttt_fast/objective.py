"""What a step minimises: a batch's rows to row losses, and row losses to one loss a delta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttt_fast import ops
from ttt_fast.batch import IGNORE_INDEX, Batch

Objective = Callable[[Any, Batch], Tensor]


class _TokenNll(torch.autograd.Function):
    """−log softmax(logits)[target]; the gradient is made in the forward, in one pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        # A copy: the logits are the model's output, and whoever holds them wants them unharmed.
        dlogits = logits.clone(memory_format=torch.contiguous_format)
        losses = ops.nll_(dlogits, targets, ignore_index=IGNORE_INDEX)
        ctx.save_for_backward(dlogits)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None]:
        (dlogits,) = ctx.saved_tensors
        return dlogits.mul_(dlosses[:, None]), None


def negative_log_likelihood(
    outputs: Any, batch: Batch, reduction: str = "mean", fused: bool = False
) -> Tensor:
    """Negative log-likelihood of each row's labels under the model, in nats.

        L_n = Σ_t w_nt · (−log p(labels_nt | tokens before t)) / (Σ_t w_nt  if "mean", 1 if "sum")

    over the t ≥ 1 whose label is kept; w is ``batch.token_weights`` or 1. Logits are taken to
    float32 at least.

    Args:
        outputs: what the model returned; ``outputs.logits`` is (N, T, V).
        batch: the rows, with labels (N, T), −100 where there is nothing to predict.
        reduction: over a row's tokens, "mean" or "sum".
        fused: use our own :func:`ttt_fast.ops.nll_` where a gradient is taken: one pass instead of
            four, equal up to rounding. Its backward can run once.

    Returns:
        (N,) float32, float64 for float64 logits.
    """
    logits = outputs.logits
    N, T, V = logits.shape
    # Shifting the labels rather than the logits saves a copy of (N, T, V).
    targets = torch.full_like(batch.labels, IGNORE_INDEX)
    targets[:, :-1] = batch.labels[:, 1:]
    logits, flat_targets = logits.reshape(N * T, V), targets.reshape(N * T)
    if fused and logits.requires_grad and torch.is_grad_enabled():
        token_nll = _TokenNll.apply(logits, flat_targets).view(N, T)
    else:
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        token_nll = F.cross_entropy(
            logits, flat_targets, ignore_index=IGNORE_INDEX, reduction="none"
        ).view(N, T)
    weights = (targets != IGNORE_INDEX).to(token_nll.dtype)
    if batch.token_weights is not None:
        weights[:, :-1] *= batch.token_weights[:, 1:].to(weights.dtype)
    row_nll = (token_nll * weights).sum(1)
    return row_nll / weights.sum(1) if reduction == "mean" else row_nll


def reduce_rows(row_losses: Tensor, row_weights: Tensor | None, n_deltas: int = 1) -> Tensor:
    """One loss for each delta: Σ_n row_weights_n · row_losses_n, the rows' mean without weights.

    Args:
        row_losses: (N,), the rows of a delta one after the other, equally many for each.
        row_weights: (N,) or None.
        n_deltas: number of deltas n.

    Returns:
        (n,).
    """
    if row_weights is None:
        return row_losses.view(n_deltas, -1).mean(1)
    return (row_losses * row_weights.to(row_losses.dtype)).view(n_deltas, -1).sum(1)
