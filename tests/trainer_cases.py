"""What the tests of the trainer share."""

import torch

from tests.loops import prompt_ids
from ttt_fast import TTTConfig, TTTTrainer

OPTIONS = dict(steps=3, lr=2e-2, weight_decay=0.01, max_grad_norm=1.0)
IDS = prompt_ids(7)
GENERATE = dict(max_new_tokens=6, do_sample=False)


def trainer_of(model, tokenizer=None, **options):
    # What several deltas are to the dense engine; tests/test_factored.py has the other one.
    options = dict(engine="dense") | OPTIONS | options
    return TTTTrainer(model, TTTConfig(**options), tokenizer=tokenizer)


def padded(ids, left, right):
    """Ids and mask with padding of an id that is not innocent."""
    pad = torch.nn.functional.pad
    return pad(ids, (left, right), value=0), pad(torch.ones_like(ids), (left, right))
