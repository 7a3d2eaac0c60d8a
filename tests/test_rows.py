"""Rows of factors by themselves: which step they belong to, and the memory that they lie in."""

import torch

from ttt_fast.engines.rows import RowBuffer, Rows

CPU = torch.device("cpu")
ALL = slice(0, 3)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row_buffer(width=2, n_deltas=3, capacity=4):
    buffer = RowBuffer(width, torch.float64, CPU)
    buffer.begin(n_deltas, capacity)
    return buffer


def filled_with_nan(width=2, n_deltas=3, capacity=4):
    """A buffer whose memory the prompt before left full of NaN."""
    buffer = row_buffer(width, n_deltas, capacity)
    buffer.write(slice(0, n_deltas), 0, torch.full((n_deltas, capacity, width), torch.nan))
    buffer.begin(n_deltas, capacity)
    return buffer


# ---------------------------------------------------------------------------- which step is whose


def test_rows_know_their_step_where_deltas_differ_in_length():
    rows = Rows(3).append(0, ALL, 2).append(1, slice(1, 2), 3).append(2, slice(0, 2), 1)
    assert rows.lengths == (3, 6, 2)
    assert rows.columns(CPU).tolist() == [
        [0, 0, 2, -1, -1, -1],
        [0, 0, 1, 1, 1, 2],
        [0, 0, -1, -1, -1, -1],
    ]
    assert [rows.longest(s) for s in (ALL, slice(0, 1), slice(2, 3))] == [6, 3, 2]


def test_rows_start_at_one_number_or_at_one_each():
    rows = Rows(3).append(0, ALL, 2).append(1, slice(1, 2), 3)
    assert rows.start(ALL) == (2, 5, 2)
    assert rows.start(slice(0, 1)) == 2 and rows.start(slice(1, 2)) == 5
    assert Rows(3).start(ALL) == 0 and Rows(3).longest(ALL) == 0


def test_rows_that_were_written_alike_are_one_object():
    root = Rows(3)
    first = root.append(0, ALL, 2)
    assert root.append(0, ALL, 2) is first
    for step, deltas, count in ((1, ALL, 2), (0, slice(0, 2), 2), (0, ALL, 1)):
        assert root.append(step, deltas, count) is not first
    assert root.lengths == (0, 0, 0) and first.append(1, ALL, 2) is not first


def test_rows_of_no_delta():
    assert Rows(2).columns(CPU).shape == (2, 0)


def test_a_step_of_very_many_parts_is_tabled():
    """Each part of a step appends; nobody asks which step a row belongs to in between."""
    n = 1500
    rows = Rows(n)
    for d in range(n):
        rows = rows.append(0, slice(d, d + 1), 1 + d % 2)
    for d in range(n):
        rows = rows.append(1, slice(d, d + 1), 1)
    table = rows.columns(CPU)
    assert table[0].tolist() == [0, 1, -1] and table[1].tolist() == [0, 0, 1]
    assert torch.equal(table[2:], table[:2].repeat(n // 2 - 1, 1))


# ---------------------------------------------------------------------------- buffers


def test_a_buffer_gives_back_what_was_written_at_ragged_starts():
    buffer = row_buffer()
    first, second, third = noise(3, 2, 2), noise(1, 3, 2, seed=1), noise(3, 1, 2, seed=2)
    buffer.write(ALL, 0, first)
    buffer.write(slice(1, 2), 2, second)
    buffer.write(ALL, (2, 5, 2), third)
    assert torch.equal(buffer.first(slice(1, 2), 6)[0], torch.cat([first[1], second[0], third[1]]))
    for delta in (0, 2):
        expected = torch.cat([first[delta], third[delta], torch.zeros(3, 2)])
        assert torch.equal(buffer.first(ALL, 6)[delta], expected)
    assert torch.equal(buffer.at(ALL, (2, 5, 2), 1), third)
    assert torch.equal(buffer.at(slice(1, 2), 2, 3), second)


def test_a_buffer_that_grows_keeps_its_rows():
    buffer = row_buffer(capacity=1)
    written = [noise(3, 3, 2, seed=i) for i in range(6)]
    for i, rows in enumerate(written):
        buffer.write(ALL, 3 * i, rows)
    assert torch.equal(buffer.first(ALL, 18), torch.cat(written, 1))


def test_room_is_kept_from_prompt_to_prompt_and_made_where_there_is_not_enough():
    buffer = row_buffer(capacity=8)
    place, nbytes = buffer.first(ALL, 1).data_ptr(), buffer.nbytes
    assert nbytes == 3 * 8 * 2 * 8
    for n_deltas, capacity in ((3, 8), (1, 24), (2, 5)):
        buffer.begin(n_deltas, capacity)
        assert buffer.first(slice(0, 1), 1).data_ptr() == place and buffer.nbytes == nbytes
    buffer.begin(3, 9)
    assert buffer.nbytes == 3 * 9 * 2 * 8


def test_rows_behind_a_shorter_delta_are_zero_whatever_was_in_the_memory():
    """Their coefficients are 0 there, and 0 times NaN is not 0."""
    buffer = filled_with_nan()
    buffer.write(ALL, 0, noise(3, 1, 2))
    buffer.write(slice(0, 1), 1, noise(1, 3, 2))
    assert torch.equal(buffer.first(ALL, 4)[1:, 1:], torch.zeros(2, 3, 2).double())
    buffer.write(ALL, (4, 1, 1), noise(3, 2, 2))
    assert buffer.first(ALL, 6).isfinite().all()
    # Also where the memory is new, and where only it is.
    buffer.write(slice(2, 3), 3, torch.ones(1, 100, 2))
    assert buffer.first(ALL, 103).isfinite().all()


def test_zeros_are_written_over_whatever_there_is():
    for start in (0, (0, 1, 2)):
        buffer = filled_with_nan()
        buffer.zero(ALL, start, 2)
        assert torch.equal(buffer.at(ALL, start, 2), torch.zeros(3, 2, 2).double())


def test_integers_are_rows_too():
    ids = RowBuffer(1, torch.int64, CPU)
    ids.begin(2, 1)
    ids.write(slice(0, 2), 0, torch.tensor([[[5], [6]], [[7], [8]]]))
    assert ids.first(slice(0, 2), 2)[:, :, 0].tolist() == [[5, 6], [7, 8]]
