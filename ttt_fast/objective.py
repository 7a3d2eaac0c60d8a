"""What a step minimises: a batch's rows to row losses, and row losses to one loss a delta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_fast.batch import IGNORE_INDEX, Batch

Objective = Callable[[Any, Batch], Tensor]


def negative_log_likelihood(outputs: Any, batch: Batch, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood of each row's labels under the model, in nats.

        L_n = Σ_t w_nt · (−log p(labels_nt | tokens before t)) / (Σ_t w_nt  if "mean", 1 if "sum")

    over the t ≥ 1 whose label is kept; w is ``batch.token_weights`` or 1. Logits are taken to
    float32 at least.

    Args:
        outputs: what the model returned; ``outputs.logits`` is (N, T, V).
        batch: the rows, with labels (N, T), −100 where there is nothing to predict.
        reduction: over a row's tokens, "mean" or "sum".

    Returns:
        (N,) float32, float64 for float64 logits.
    """
    logits = outputs.logits
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    N, T, V = logits.shape
    # Shifting the labels rather than the logits saves a copy of (N, T, V).
    targets = torch.full_like(batch.labels, IGNORE_INDEX)
    targets[:, :-1] = batch.labels[:, 1:]
    token_nll = F.cross_entropy(
        logits.reshape(N * T, V),
        targets.reshape(N * T),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    ).view(N, T)
    weights = (targets != IGNORE_INDEX).to(token_nll.dtype)
    if batch.token_weights is not None:
        weights[:, :-1] *= batch.token_weights[:, 1:].to(weights.dtype)
    row_nll = (token_nll * weights).sum(1)
    return row_nll / weights.sum(1) if reduction == "mean" else row_nll


def reduce_rows(row_losses: Tensor, row_weights: Tensor | None) -> Tensor:
    """One delta's loss: Σ_n row_weights_n · row_losses_n, the rows' mean without weights."""
    if row_weights is None:
        return row_losses.mean()
    return (row_losses * row_weights.to(row_losses.dtype)).sum()
