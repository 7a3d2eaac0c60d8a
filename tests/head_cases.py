"""Batches and runs for the tests of heads that compute the loss."""

import torch

from tests.loops import prompt_ids
from ttt_fast import Batch, TTTConfig, TTTTrainer, negative_log_likelihood

STEPS = 3
T = 9


def trainer_of(model, objective=None, **options):
    options = dict(steps=STEPS, lr=2e-2, momentum=0.9, max_grad_norm=1.0) | options
    return TTTTrainer(model, TTTConfig(**options), objective=objective)


def with_logits(reduction="mean"):
    """An objective of the user's, which is plain torch on real logits."""
    return lambda outputs, batch: negative_log_likelihood(outputs, batch, reduction)


def batch_of(kind):
    """Rows of two deltas: as they are, with labels masked out, weighted, or padded."""
    ids = prompt_ids(T, n_rows=4, seed=3)
    labels, mask, token_weights, row_weights = ids.clone(), None, None, None
    if kind != "plain":
        labels[0, :6], labels[1, 2:], labels[3, 4:6] = -100, -100, -100
    if kind == "weights":
        token_weights = torch.rand(4, T, generator=torch.Generator().manual_seed(2)) + 0.1
        row_weights = torch.tensor([0.5, 2.0, 1.0, 0.25])
    if kind == "padded":
        mask = torch.ones(4, T, dtype=torch.int64)
        mask[1, 4:], mask[3, 7:] = 0, 0
    return Batch(
        ids, labels, mask, token_weights=token_weights, row_weights=row_weights,
        delta_index=torch.tensor([0, 0, 1, 1]),
    )  # fmt: skip


def run(model, batch, objective=None, steps=STEPS, **options):
    """Losses and norms of each step, the loss afterwards, and the engine's head."""
    trainer = trainer_of(model, objective, **options)
    with trainer.begin(2, 2 * T) as session:
        reports = [session.step(batch) for _ in range(steps)]
        after = session.loss(batch)
        head = session.engine.head
    numbers = [each for r in reports for each in (r.losses, r.grad_norms)]
    return torch.stack([*numbers, after]), head
