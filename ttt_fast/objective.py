"""What a step minimises: a batch's rows to row losses, and row losses to one loss a delta."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    targets = next_tokens(batch.labels)
    logits, flat_targets = logits.reshape(N * T, V), targets.reshape(N * T)
    if fused and logits.requires_grad and torch.is_grad_enabled():
        token_nll = _TokenNll.apply(logits, flat_targets).view(N, T)
    else:
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        token_nll = F.cross_entropy(
            logits, flat_targets, ignore_index=IGNORE_INDEX, reduction="none"
        ).view(N, T)
    return row_losses(token_nll, targets, batch, reduction)


def fused_reduction(objective: Objective) -> str | None:
    """The reduction, if the objective is :func:`negative_log_likelihood`, fused; otherwise None."""
    if not isinstance(objective, partial) or objective.func is not negative_log_likelihood:
        return None
    options = {"reduction": "mean", "fused": False} | objective.keywords
    return options["reduction"] if options["fused"] and not objective.args else None


def next_tokens(labels: Tensor) -> Tensor:
    """The label after each position (N, T); −100 after the last.

    To shift the labels rather than the logits saves a copy of (N, T, V).
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    return targets


def row_losses(token_nll: Tensor, targets: Tensor, batch: Batch, reduction: str) -> Tensor:
    """Losses of rows (N,) from those of their tokens (N, T), whose targets are (N, T)."""
    weights = _token_weights(targets, batch, token_nll.dtype)
    row_nll = (token_nll * weights).sum(1)
    return row_nll / weights.sum(1) if reduction == "mean" else row_nll


def token_scale(
    targets: Tensor, batch: Batch, reduction: str, n_deltas: int, dtype: torch.dtype
) -> Tensor:
    """Derivative of the sum of the deltas' losses by the loss of each token, (N, T).

    To the bit what autograd finds for :func:`reduce_rows` of :func:`row_losses`.
    """
    weights = _token_weights(targets, batch, dtype)
    if batch.row_weights is None:
        rows = weights.new_full((len(weights),), 1.0) / (len(weights) // n_deltas)
    else:
        rows = batch.row_weights.to(dtype)
    return (rows / weights.sum(1) if reduction == "mean" else rows)[:, None] * weights


def _token_weights(targets: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    weights = (targets != IGNORE_INDEX).to(dtype)
    if batch.token_weights is not None:
        weights[:, :-1] *= batch.token_weights[:, 1:].to(dtype)
    return weights


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


def delta_losses(objective: Objective, outputs: Any, rows: Batch, n_deltas: int) -> Tensor:
    """Loss of each delta (n,) by an objective, from what the model returned for their rows.

    Raises:
        ValueError: the objective did not return one loss for each row.
    """
    losses = objective(outputs, rows)
    if not isinstance(losses, Tensor) or losses.shape != (rows.n_rows,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"adapt: the objective returned {got}; it must return one loss for each of the"
            f" {rows.n_rows} rows, a tensor of shape ({rows.n_rows},)."
        )
    return reduce_rows(losses, rows.row_weights, n_deltas)
