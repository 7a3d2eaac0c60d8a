"""Rows of tokens: what is filled in, what is cut away."""

import pytest
import torch

from tests.families import tiny_model
from tests.loops import prompt_ids
from ttt_fast import Batch, negative_log_likelihood
from ttt_fast.batch import complete_batch, context_length, forward_arguments, pad_rows
from ttt_fast.objective import reduce_rows

MODEL = tiny_model("llama")


def test_defaults():
    ids = prompt_ids(4, n_rows=2)
    batch = complete_batch(Batch(ids), MODEL, 1)
    assert batch.labels.tolist() == [[-100, *row[1:]] for row in ids.tolist()]
    assert batch.attention_mask.tolist() == [[1] * 4] * 2
    assert batch.delta_index.tolist() == [0, 0]
    assert batch.position_ids is None and batch.token_weights is None
    assert set(batch.model_inputs(forward_arguments(MODEL))) == {"input_ids", "use_cache"}


def test_completing_twice_changes_nothing():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    once = complete_batch(Batch(prompt_ids(4, n_rows=2), attention_mask=mask), MODEL, 1)
    twice = complete_batch(once, MODEL, 1)
    for name in ("input_ids", "labels", "attention_mask", "position_ids", "delta_index"):
        assert torch.equal(getattr(once, name), getattr(twice, name)), name


def test_padding_is_neither_predicted_nor_counted():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 1, 1]])
    batch = complete_batch(Batch(prompt_ids(5, n_rows=3), attention_mask=mask), MODEL, 1)
    kept = (batch.labels != -100).int().tolist()
    # The first token after padding follows nothing.
    assert kept == [[0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 1, 0, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 1, 2, 3]]


def test_rows_are_taken_in_the_order_asked_for():
    ids = prompt_ids(4, n_rows=3)
    batch = complete_batch(Batch(ids, row_weights=torch.tensor([1.0, 2, 3])), MODEL, 1)
    taken = batch.rows(torch.tensor([2, 0, 1]))
    assert torch.equal(taken.input_ids, ids[[2, 0, 1]])
    assert taken.row_weights.tolist() == [3, 1, 2]
    assert torch.equal(batch.rows(torch.arange(3)).input_ids, ids)


def test_rows_lose_the_columns_that_none_of_them_uses():
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    ids = prompt_ids(5, n_rows=3)
    batch = complete_batch(Batch(ids, attention_mask=mask), MODEL, 1)
    taken = batch.rows(torch.tensor([0, 1]))
    assert torch.equal(taken.input_ids, ids[:2, 1:4])
    assert taken.attention_mask.tolist() == [[1, 1, 0], [0, 1, 1]]
    assert taken.position_ids.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert batch.rows(torch.tensor([2, 0])).input_ids.shape == (2, 5)


def test_a_cache_cannot_be_divided():
    batch = Batch(prompt_ids(4, n_rows=2), past_key_values=object())
    with pytest.raises(ValueError, match="past_key_values belongs to all rows"):
        batch.rows(torch.tensor([1]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_rows(side):
    ids, mask = pad_rows([torch.tensor([1, 2, 3]), torch.tensor([4])], 9, side)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4] if side == "left" else [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1] if side == "left" else [1, 0, 0]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_context_length(family):
    assert context_length(tiny_model(family)) == 64


def test_a_model_that_does_not_say_its_context():
    assert context_length(torch.nn.Linear(2, 2)) is None


def test_forward_arguments_look_into_wrappers():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    assert {"input_ids", "position_ids"} <= forward_arguments(Wrapper(Wrapper(MODEL)))


def test_losses_of_rows_and_deltas():
    class Outputs:
        logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))

    labels = torch.tensor([[-100, 1, 4], [-100, -100, 2]])
    nll = -Outputs.logits.log_softmax(-1)
    expected = [[nll[0, 0, 1], nll[0, 1, 4]], [nll[1, 1, 2]]]
    batch = Batch(labels, labels=labels)
    sums = torch.stack([torch.stack(row).sum() for row in expected])
    means = torch.stack([torch.stack(row).mean() for row in expected])
    assert torch.allclose(negative_log_likelihood(Outputs, batch, "sum"), sums)
    assert torch.allclose(negative_log_likelihood(Outputs, batch), means)
    assert torch.allclose(reduce_rows(means, None), means.mean())
    assert torch.allclose(reduce_rows(means, torch.tensor([2, 1])), 2 * means[0] + means[1])


def test_losses_in_half_precision_are_float32():
    class Outputs:
        logits = torch.randn(1, 3, 5).bfloat16()

    batch = Batch(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[-100, 2, 3]]))
    assert negative_log_likelihood(Outputs, batch).dtype == torch.float32
