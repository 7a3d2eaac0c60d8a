"""Factors by themselves: what is recorded, what is shared, and what never gets in."""

import pytest
import torch

from ttt_fast import Selection, ops
from ttt_fast.engines.factors import (
    Inputs,
    Lookups,
    MatrixFactors,
    Padding,
    Track,
    VectorFactors,
    squared_norm,
)
from ttt_fast.engines.rows import RowBuffer, Rows
from ttt_fast.selection import RowSlice
from ttt_fast.sgd import Coefficients

CPU = torch.device("cpu")
ALL = slice(0, 3)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------- padding


@pytest.mark.parametrize("numbered", [True, False])
def test_nan_at_padding_does_not_get_in(numbered):
    tokens = torch.tensor([[1, 0], [1, 1], [0, 0]]) != 0
    rows = noise(3, 2, 2).masked_fill(~tokens[..., None], torch.nan)
    expected = torch.where(tokens[..., None], rows, 0)
    padding = Padding(tokens)
    if not numbered:
        padding._where = None  # as on a device that the host does not wait for
    assert torch.equal(padding.blanked(rows), expected)
    assert rows.isnan().sum() == 6
    buffer = RowBuffer(2, torch.float64, CPU)
    buffer.begin(3, 3)
    place = buffer.room(ALL, 1, 2).copy_(rows)
    assert buffer.first(ALL, 3)[:, 1:].isnan().sum() == 6
    padding.blank_(place)
    assert torch.equal(buffer.first(ALL, 3)[:, 1:], expected)


def test_rows_that_begin_at_different_numbers_have_no_one_place():
    inputs, x = some_inputs(Rows(3).append(0, slice(1, 2), 2)), noise(3, 2, 2)
    x[0, 1] = torch.nan
    padding = Padding(torch.tensor([[1, 0], [1, 1], [1, 1]]) != 0)
    assert inputs.record(x, x, ALL, 1, padding) == ((0, 2, 0), None)
    assert torch.equal(inputs.buffer.at(ALL, (0, 2, 0), 2), padding.blanked(x))


# ---------------------------------------------------------------------------- X, shared


def some_inputs(root=None, width=2):
    inputs = Inputs(width, torch.float64, CPU)
    inputs.begin(Rows(3) if root is None else root, 4)
    return inputs


def put(inputs, x, step=0):
    """Record x as a product does; return the start of its rows."""
    start, place = inputs.record(x, x, ALL, step, None)
    if place is not None:
        place.copy_(x)
    return start


def test_the_same_tensor_is_written_once():
    inputs, x = some_inputs(), noise(3, 2, 2)
    assert [put(inputs, x) for _ in "qkv"] == [0, 0, 0]
    assert inputs.record(x, x, ALL, 0, None) == (0, None)
    assert inputs.calls == [(0, 2)] and inputs.pending.lengths == (2, 2, 2)
    assert inputs.rows.lengths == (0, 0, 0)


def test_another_tensor_of_equal_values_is_another_call():
    inputs, x = some_inputs(), noise(3, 2, 2)
    assert put(inputs, x) == 0
    other = x.clone()
    assert put(inputs, other) == 2
    assert inputs.calls == [(0, 2), (2, 2)]


def test_a_tensor_that_was_written_to_is_another_one():
    inputs, x = some_inputs(), noise(3, 2, 2)
    put(inputs, x)
    x.mul_(2)
    assert not inputs.is_last(x)
    assert put(inputs, x) == 2
    assert torch.equal(inputs.buffer.first(ALL, 4)[:, 2:], 2 * inputs.buffer.first(ALL, 2))


def test_a_forward_that_is_over_is_forgotten():
    """The next forward may be given a tensor at the same place in memory."""
    inputs, x = some_inputs(), noise(3, 2, 2)
    put(inputs, x)
    inputs.forget()
    assert not inputs.is_last(x) and inputs.calls == []
    assert put(inputs, x, step=1) == 2


# ---------------------------------------------------------------------------- one matrix


def track(n_deltas=3):
    return Track(-1, Coefficients(n_deltas, momentum=0.0), decays=False)


def matrix_of(shape=(4, 2), rows=None, embeds=False, transposed=False, root=None):
    """Factors of a matrix that joined an X."""
    weight = torch.nn.Parameter(noise(*shape))
    factors = MatrixFactors(Selection("w", weight, rows), transposed=transposed, embeds=embeds)
    root = Rows(3) if root is None else root
    factors.inputs = some_inputs(root, factors.weight.shape[1])
    factors.begin(root, 4, track())
    return factors


def record(factors, x, dy, deltas=ALL, step=0):
    start, place = factors.inputs.record(x, x, deltas, step, None)
    if place is not None:
        place.copy_(x)
    if dy is not None:
        factors.record_dy(deltas, start, dy)


def norm_of(factors, deltas=ALL):
    return squared_norm([factors], deltas, "cpu")


def test_the_norm_of_a_matrix():
    factors = matrix_of()
    x, dy = noise(3, 5, 2), noise(3, 5, 4, seed=1)
    record(factors, x, dy)
    assert factors.close_forward(ALL)
    gradient = dy.transpose(1, 2) @ x
    assert torch.allclose(norm_of(factors), gradient.square().sum((1, 2)), rtol=1e-12)


def test_two_uses_are_more_tokens_of_one_gradient():
    factors = matrix_of()
    pairs = [(noise(3, 2, 2, seed=i), noise(3, 2, 4, seed=9 + i)) for i in range(2)]
    for x, dy in pairs:
        record(factors, x, dy)
    factors.close_forward(ALL)
    gradient = sum(dy.transpose(1, 2) @ x for x, dy in pairs)
    assert torch.allclose(norm_of(factors), gradient.square().sum((1, 2)), rtol=1e-12)


def test_a_use_without_a_gradient_leaves_zeros():
    factors = matrix_of()
    factors.dy.write(ALL, 0, torch.full((3, 4, 4), torch.nan))
    factors.dy.begin(3, 4)
    x, dy = noise(3, 2, 2), noise(3, 2, 4, seed=1)
    record(factors, x, None)
    record(factors, noise(3, 2, 2, seed=2), dy)
    assert factors.close_forward(ALL)
    assert torch.equal(factors.dy.first(ALL, 2), torch.zeros(3, 2, 4).double())
    expected = (dy.transpose(1, 2) @ noise(3, 2, 2, seed=2)).square().sum((1, 2))
    assert torch.allclose(norm_of(factors), expected, rtol=1e-12)


def test_a_matrix_that_nothing_reached_says_so():
    factors = matrix_of(embeds=True)
    record(factors, noise(3, 2, 2), None)
    factors.lookups.record_ids(ALL, 0, torch.zeros(3, 2, dtype=torch.int64))
    assert not factors.close_forward(ALL)
    assert torch.equal(norm_of(factors), torch.zeros(3).double())
    factors.open_forward()
    assert not factors.close_forward(ALL)


def test_what_arrived_in_one_forward_is_not_there_in_the_next():
    factors = matrix_of()
    record(factors, noise(3, 2, 2), noise(3, 2, 4))
    assert factors.close_forward(ALL)
    factors.inputs.rows = factors.inputs.pending
    factors.inputs.forget()
    factors.open_forward()
    record(factors, noise(3, 2, 2, seed=5), None, step=1)
    assert not factors.close_forward(ALL)
    assert torch.equal(norm_of(factors), torch.zeros(3).double())


def test_the_norm_is_that_of_the_step_in_progress_alone():
    factors = matrix_of()
    record(factors, noise(3, 2, 2), noise(3, 2, 4))
    factors.close_forward(ALL)
    # Only delta 1 and 2 take part in the second step, so all three start at different rows.
    factors.inputs.rows = factors.inputs.pending
    factors.inputs.forget()
    factors.open_forward()
    tail = slice(1, 3)
    x, dy = noise(2, 3, 2, seed=3), noise(2, 3, 4, seed=4)
    record(factors, x, dy, deltas=tail, step=1)
    factors.close_forward(tail)
    expected = (dy.transpose(1, 2) @ x).square().sum((1, 2))
    assert torch.allclose(norm_of(factors, tail), expected, rtol=1e-12)
    assert factors.inputs.pending.lengths == (2, 5, 5)


def test_selected_columns_of_dy():
    """A slice of a fused projection keeps its own columns, period by period."""
    factors = matrix_of((8, 2), rows=RowSlice(period=4, start=1, length=2, dim=0))
    x, dy = noise(3, 5, 2), noise(3, 5, 8, seed=1)
    record(factors, x, dy)
    kept = dy[:, :, [1, 2, 5, 6]]
    assert torch.equal(factors.dy.first(ALL, 5), kept)
    expected = (kept.transpose(1, 2) @ x).square().sum((1, 2))
    assert torch.allclose(norm_of(factors), expected, rtol=1e-12)


# ---------------------------------------------------------------------------- lookups


def looked_up(ids, de, vocabulary):
    """The gradient of an embedding from lookups alone, (V, width) for each delta."""
    gradient = de.new_zeros(ids.shape[0], vocabulary, de.shape[2])
    for delta in range(ids.shape[0]):
        gradient[delta].index_add_(0, ids[delta], de[delta])
    return gradient


def test_the_norm_of_a_tied_matrix_has_its_cross_term():
    factors = matrix_of((6, 2), embeds=True)
    ids = torch.tensor([[0, 1, 1, 5], [2, 2, 2, 2], [0, 3, 4, 3]])
    de, x, dy = noise(3, 4, 2), noise(3, 4, 2, seed=1), noise(3, 4, 6, seed=2)
    start = factors.lookups.record_ids(ALL, 0, ids)
    record(factors, x, dy)
    factors.lookups.record_dy(ALL, start, de)
    assert factors.close_forward(ALL)
    gradient = dy.transpose(1, 2) @ x + looked_up(ids, de, 6)
    assert torch.allclose(norm_of(factors), gradient.square().sum((1, 2)), rtol=1e-12)
    separate = ops.gram_norm(x, dy) + looked_up(ids, de, 6).square().sum((1, 2))
    assert not torch.allclose(norm_of(factors), separate, rtol=1e-3)


def test_a_lookup_without_a_gradient_leaves_zeros():
    factors = matrix_of((6, 2), embeds=True)
    factors.lookups.dy.write(ALL, 0, torch.full((3, 4, 2), torch.nan))
    factors.lookups.dy.begin(3, 4)
    ids = torch.tensor([[0, 1], [2, 2], [4, 3]])
    factors.lookups.record_ids(ALL, 0, ids)
    second = factors.lookups.record_ids(ALL, 0, ids)
    assert second == 2
    factors.lookups.record_dy(ALL, second, noise(3, 2, 2))
    assert factors.close_forward(ALL)
    expected = looked_up(ids, noise(3, 2, 2), 6).square().sum((1, 2))
    assert torch.allclose(norm_of(factors), expected, rtol=1e-12)


def test_lookups_start_a_prompt_without_rows():
    lookups = Lookups(2, torch.float64, CPU)
    for _ in range(2):
        root = Rows(3)
        lookups.begin(root, 4)
        assert lookups.rows is lookups.pending is root
        assert lookups.record_ids(ALL, 0, torch.zeros(3, 2, dtype=torch.int64)) == 0
        lookups.record_dy(ALL, 0, noise(3, 2, 2))


# ---------------------------------------------------------------------------- vectors

# β before the first step.
NO_STEP = torch.zeros(3, 0, dtype=torch.float64)


def vector_of(size=4, rows=None, dtype=torch.float64):
    param = torch.nn.Parameter(noise(size).to(dtype))
    factors = VectorFactors(Selection("b", param, rows))
    factors.begin(Rows(3), 2, track())
    return factors


@pytest.mark.parametrize("rows", [None, RowSlice(period=2, start=1, length=1, dim=0)])
def test_the_gradient_of_a_vector_is_kept_and_read_back(rows):
    factors = vector_of(rows=rows)
    leaf = factors.leaf(factors.effective(None, NO_STEP, ALL), 0)
    assert torch.equal(leaf[2], factors.base) and factors.leaf(leaf * 2, 0) is leaf
    target = noise(3, 4, seed=1)
    (leaf * target).sum().backward()
    assert factors.close_forward(ALL)
    kept = torch.zeros(4, dtype=torch.bool)
    kept[1 if rows else 0 :: 2 if rows else 1] = True
    gradient = torch.where(kept, target, 0)
    assert torch.allclose(factors.squared_norm(ALL), gradient.square().sum(1))
    factors.close_step()
    beta = torch.tensor([[0.5], [-2.0], [0.0]], dtype=torch.float64)
    moved = factors.effective(None, beta, ALL) - factors.base
    assert torch.allclose(moved, -beta * gradient)
    rho = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    scaled = factors.effective(rho, NO_STEP, ALL)
    assert torch.equal(scaled, torch.where(kept, rho[:, None], 1.0) * factors.base)


def test_a_vector_that_nothing_reached_keeps_no_row():
    factors = vector_of()
    assert not factors.close_forward(ALL)
    factors.leaf(factors.effective(None, NO_STEP, ALL), 0)
    assert not factors.close_forward(ALL)
    assert factors.pending.lengths == (0, 0, 0)
    factors.open_forward()
    assert factors.current_leaf is None


def test_a_bfloat16_vector_is_kept_in_float32():
    factors = vector_of(dtype=torch.bfloat16)
    leaf = factors.leaf(factors.effective(None, NO_STEP, ALL), 0)
    (leaf * 1e-3).sum().backward()
    assert factors.close_forward(ALL)
    factors.close_step()
    beta = torch.full((3, 1), 1e-3)
    assert not torch.equal(factors.effective(None, beta, ALL)[0], factors.base)
    assert factors.grads.first(ALL, 1).dtype == torch.float32
