import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.update_cases import make_case, row_slices
from ttt_fast.kernels import pointer_table
from ttt_fast.kernels.pointer_table import device_integers, pointer_tables, with_long_runs

DTYPES = (torch.float32, torch.bfloat16)


def values_at(address: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """What lies in memory."""
    buffer = (ctypes.c_char * (numel * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).clone()


def assert_covers(tables: list, lists: list[list[torch.Tensor]], chunk: int) -> None:
    """Every element of every list is in one chunk, and all lists are cut alike."""
    for number, tensors in enumerate(lists):
        seen = [torch.zeros(t.numel(), dtype=torch.int) for t in tensors]
        for table in tables:
            for row in (table.numel, table.index, table.tensor):
                assert row.shape == (table.n_chunks,)
            assert table.pointers.shape == (len(lists), table.n_chunks)
            rows = zip(
                table.pointers[number].tolist(), table.numel.tolist(), table.index.tolist(),
                table.tensor.tolist(), strict=True,
            )  # fmt: skip
            for address, numel, index, i in rows:
                assert 0 < numel <= chunk and index // chunk == (index + numel - 1) // chunk
                seen[i][index : index + numel] += 1
                tensor = tensors[i]
                assert table.dtypes[number] == tensor.dtype
                assert not table.aligned or address % 16 == 0
                expected = tensor.contiguous().flatten()[index : index + numel]
                assert torch.equal(values_at(address, numel, tensor.dtype), expected)
        for each in seen:
            assert (each == 1).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_covers_every_element_once(data):
    shapes = data.draw(
        st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5)
    )
    lists = []
    for _ in range(data.draw(st.integers(1, 3))):
        tensors = []
        for shape in shapes:
            # One more in each dimension, of which a corner is taken, in any order of dimensions.
            order = data.draw(st.permutations(range(len(shape))))
            more = data.draw(st.lists(st.integers(0, 1), min_size=len(shape), max_size=len(shape)))
            sizes = [shape[d] + more[d] for d in order]
            whole = torch.randn(sizes).to(data.draw(st.sampled_from(DTYPES)))
            view = whole.permute([order.index(d) for d in range(len(shape))])
            tensors.append(view[tuple(slice(0, n) for n in shape)])
        lists.append(tensors)
    chunk = data.draw(st.sampled_from([1, 4, 16, 1024]))
    assert_covers(pointer_tables(lists, chunk), lists, chunk)


def test_groups_of_dtypes_and_alignment():
    params = [torch.randn(40), torch.randn(40).bfloat16(), torch.randn(41)[1:], torch.randn(9)]
    grads = [torch.randn(t.shape).to(t.dtype) for t in params]
    tables = pointer_tables([params, [], grads], 16)
    assert_covers([t._replace(pointers=t.pointers[::2], dtypes=t.dtypes[::2]) for t in tables],
                  [params, grads], 16)  # fmt: skip
    groups = {(t.dtypes, t.aligned): sorted(set(t.tensor.tolist())) for t in tables}
    f, b = torch.float32, torch.bfloat16
    assert groups == {
        ((f, None, f), True): [0, 3], ((b, None, b), True): [1], ((f, None, f), False): [2],
    }  # fmt: skip
    assert all((t.pointers[1] == 0).all() for t in tables)


@pytest.mark.parametrize("slice_first", [False, True])
def test_row_slices_are_cut_where_all_lists_are(slice_first):
    lists = [row_slices([torch.randn(96, 48)]), [torch.randn(3, 16, 48)]]
    lists = lists if slice_first else lists[::-1]
    (table,) = pointer_tables(lists, 512)
    # Runs of 16 rows, 768 elements, and chunks of 512.
    assert table.index.tolist() == [0, 512, 768, 1024, 1536, 2048]
    assert table.numel.tolist() == [512, 256, 256, 512, 512, 256]
    assert_covers([table], lists, 512)


def test_is_built_once_for_the_same_memory(monkeypatch):
    tensors = [torch.randn(100), torch.randn(3, 5)]
    first = pointer_tables([tensors], 64)
    cuts = pointer_table._cut
    monkeypatch.setattr(pointer_table, "_build_tables", None)
    assert pointer_tables([[t.view(t.shape) for t in tensors]], 64) is first
    monkeypatch.undo()
    # New addresses are an upload; shapes and strides are not cut again.
    monkeypatch.setattr(pointer_table, "_cut", None)
    clones = [t.clone() for t in tensors]
    assert_covers(pointer_tables([clones], 64), [clones], 64)
    monkeypatch.setattr(pointer_table, "_cut", cuts)
    transposed = [tensors[0], torch.randn(5, 3).t()]
    assert_covers(pointer_tables([transposed], 64), [transposed], 64)


def test_caches_stay_small():
    for size in range(2 * pointer_table._KEPT):
        pointer_tables([[torch.zeros(size + 1)]], 64)
        device_integers([size], torch.device("cpu"))
    for cache in (pointer_table._TABLES, pointer_table._CUTS, pointer_table._INTEGERS):
        assert len(cache) <= pointer_table._KEPT


def test_what_a_graph_captures_is_kept_and_not_found_by_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(pointer_table, "_CAPTURED", [])
    tensors = [torch.randn(100)]
    captured = pointer_tables([tensors], 64)
    assert any(entry[0] is captured for entry in pointer_table._CAPTURED if len(entry) == 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert pointer_tables([tensors], 64) is not captured


def test_what_a_graph_captures_goes_with_its_owner(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    everybodys, owner = [], []
    monkeypatch.setattr(pointer_table, "_CAPTURED", everybodys)
    tensors = [torch.randn(100)]
    with pointer_table.captured_for(owner):
        captured = pointer_tables([tensors], 64)
    assert any(entry[0] is captured for entry in owner if len(entry) == 2) and not everybodys
    pointer_tables([tensors], 64)
    assert everybodys


def test_nothing_gives_no_table():
    assert pointer_tables([], 64) == pointer_tables([[], []], 64) == []
    assert pointer_tables([[torch.zeros(0)], [torch.zeros(0)]], 64) == []


def test_short_runs_become_copies():
    case = make_case([(64, 64), (40, 40), (9, 9)], [torch.float32])
    params = [case.params[0].t(), case.params[1][:, 4:], case.params[2]]
    grads = [case.grads[0], torch.ones(1).expand(40, 36), case.grads[2]]
    lists, copies = with_long_runs([params, grads, []], {0: "params"})
    assert [(a.data_ptr(), b.data_ptr()) for a, b in copies] == [
        (params[0].data_ptr(), lists[0][0].data_ptr())
    ]
    assert lists[0][1] is params[1] and lists[0][2] is params[2] and lists[1][0] is grads[0]
    assert lists[1][1].is_contiguous() and torch.equal(lists[1][1], grads[1])
    assert torch.equal(lists[0][0], params[0]) and lists[2] == []


def test_expanded_tensors_are_not_written():
    expanded = [torch.zeros(3), torch.zeros(1, 5).expand(4, 5)]
    for refused in (lambda w: pointer_tables([expanded], 64, w),
                    lambda w: with_long_runs([expanded], w)):  # fmt: skip
        with pytest.raises(ValueError, match=r"params\[1\] is expanded .* pass a clone of it"):
            refused({0: "params"})
    assert sum(t.n_chunks for t in pointer_tables([expanded], 64)) == 5
