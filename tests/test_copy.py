import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.update_cases import (
    DTYPES,
    ODD_SIZES,
    as_row_slices,
    assert_same_bits,
    backend_params,
    make_case,
    row_slices,
    sgd_step,
)
from ttt_fast import ops

backends = pytest.mark.parametrize("backend", backend_params())
needs_cpp = pytest.mark.parametrize("backend", backend_params()[1:])
HALVES = [torch.bfloat16, torch.float16]


def random_bytes(shape, dtype, seed=0):
    """Any bits at all, NaN payloads included."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).squeeze(-1)


def same_bytes(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@backends
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.int32, torch.complex64], ids=str)
def test_copy_is_bit_exact(backend, dtype):
    srcs = [random_bytes(shape, dtype) for shape in ODD_SIZES if shape]
    dsts = [torch.zeros_like(s) for s in srcs]
    ops.copy_(dsts, srcs, backend=backend)
    assert all(same_bytes(d, s) for d, s in zip(dsts, srcs, strict=True))


@backends
@pytest.mark.parametrize("offset", [0, 1, 3, 17])
def test_large_copies_with_any_alignment(backend, offset):
    # Above 8 MiB the C++ backend streams past the cache, in pieces of 64 aligned bytes.
    src = random_bytes((3_000_000,), torch.float32)[offset:-1]
    around = torch.full((3_000_010,), 7.0)
    dst = around[5 : 5 + src.numel()]
    ops.copy_([dst], [src], backend=backend)
    assert same_bytes(dst, src)
    assert (around[:5] == 7).all() and (around[5 + src.numel() :] == 7).all()


@backends
def test_copies_between_strided_views(backend):
    srcs = row_slices([random_bytes((96, 96), torch.int32, seed=i) for i in range(5)])
    dsts = row_slices([torch.zeros(96, 96, dtype=torch.int32) for _ in range(5)])
    ops.copy_(dsts, srcs, backend=backend)
    packed = [torch.zeros(s.shape, dtype=torch.int32) for s in srcs]
    ops.copy_(packed, dsts, backend=backend)
    assert all(torch.equal(p, s) for p, s in zip(packed, srcs, strict=True))


@backends
def test_copy_of_nothing_and_of_itself(backend):
    ops.copy_([], [], backend=backend)
    x = random_bytes((1000,), torch.int32)
    before = x.clone()
    ops.copy_([x], [x], backend=backend)
    assert torch.equal(x, before)


@backends
@pytest.mark.parametrize(
    ("srcs", "message"),
    [
        ([], "got 1 dsts but 0 srcs"),
        ([torch.zeros(4)], "must agree"),
        ([torch.zeros(3).double()], "must agree"),
    ],
)
def test_copy_errors(backend, srcs, message):
    with pytest.raises(ValueError, match=message):
        ops.copy_([torch.zeros(3)], srcs, backend=backend)


@needs_cpp
@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=4).map(tuple), max_size=6),
    dtype=st.sampled_from([*DTYPES, torch.int8, torch.int64]),
    permute=st.booleans(),
)
def test_checksums_agree_and_copies_keep_them(backend, shapes, dtype, permute):
    tensors = [random_bytes((*shape, 1), dtype, seed=i) for i, shape in enumerate(shapes)]
    if permute:
        tensors = [t.permute(*reversed(range(t.dim()))) for t in tensors]
    expected = ops.checksum(tensors, backend="torch")
    assert ops.checksum(tensors, backend=backend) == expected
    copies = [torch.zeros_like(t) for t in tensors]
    ops.copy_(copies, tensors, backend=backend)
    assert ops.checksum(copies, backend=backend) == expected


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksum_sees_every_change(backend, dtype):
    tensors = [random_bytes((70000,), dtype, seed=i) for i in range(2)]
    seen = {ops.checksum(tensors, backend=backend)}
    seen.add(ops.checksum(tensors[::-1], backend=backend))
    for position in (0, 1, 65535, 65536, 69999):
        raw = tensors[0].view(torch.uint8).view(70000, -1)
        raw[position, 0] ^= 1
        seen.add(ops.checksum(tensors, backend=backend))
        raw[position, 0] ^= 1
    flipped = [torch.cat([tensors[0][1:2], tensors[0][:1], tensors[0][2:]]), tensors[1]]
    seen.add(ops.checksum(flipped, backend=backend))
    assert len(seen) == 8


# ------------------------------------------------------------------------------------------- undo


def undo_case(strided=False):
    if strided:
        return as_row_slices(make_case([(96, 48), (128, 96), (200, 48), (96, 96)], HALVES))
    return make_case([(7,), (131075,), (4097,), (1,), (0,), (70000,)], HALVES)


@backends
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("lr", [1e-5, 1e-3, 1.0])
def test_undo_restores_every_bit_after_many_steps(backend, strided, lr):
    case = undo_case(strided)
    before = case.clone()
    undo = ops.UndoLog(case.params)
    for step in range(8):
        sgd_step(case, backend, lr=lr, rounding="stochastic", seed=step, undo=undo)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(case.params, before.params, "params")
    for _ in range(2):  # restoring again changes nothing
        ops.undo_restore_(case.params, undo, backend=backend)
        assert_same_bits(case.params, before.params, "params")


@needs_cpp
@pytest.mark.parametrize("lr", [1e-4, 1e-1])
def test_undo_logs_of_both_backends_agree(backend, lr):
    logs = []
    for name in ("torch", backend):
        case = undo_case()
        undo = ops.UndoLog(case.params)
        for step in range(4):
            sgd_step(case, name, lr=lr, seed=step, undo=undo)
        logs.append(undo)
    expected, actual = logs
    assert actual.entries == expected.entries and actual.nbytes == expected.nbytes
    for k in (3, 4):  # counts, paged
        assert torch.equal(actual.tensors[k], expected.tensors[k])
    assert sorted(actual.tensors[0][: actual.entries].tolist()) == sorted(
        expected.tensors[0][: expected.entries].tolist()
    )


@backends
def test_undo_falls_over_to_whole_runs_where_that_is_smaller(backend):
    sparse = make_case([(65536,), (65536,)], [torch.bfloat16])
    undo = ops.UndoLog(sparse.params)
    empty = undo.nbytes
    sparse.grads[0].zero_()
    sparse.grads[0][:100] = 1.0
    sgd_step(sparse, backend, lr=1.0, undo=undo)
    assert undo.paged_chunks == 1, "every element of the second tensor changed"
    assert undo.entries == 100
    assert undo.nbytes == empty + 6 * 100 + 2 * 65536
    sgd_step(sparse, backend, lr=1.0, undo=undo)
    assert undo.entries == 200 and undo.paged_chunks == 1
    undo.reset()
    assert undo.nbytes == empty


@backends
def test_a_run_that_fills_up_step_by_step_is_restored_from_page_and_log(backend):
    case = make_case([(65536,)], [torch.bfloat16])
    before = case.clone()
    undo = ops.UndoLog(case.params)
    for step in range(6):
        case.grads[0].zero_()
        case.grads[0][step * 5000 : step * 5000 + 9000] = 1.0
        sgd_step(case, backend, lr=0.5, undo=undo)
    assert undo.paged_chunks == 1 and undo.entries == 2 * 9000
    ops.undo_restore_(case.params, undo, backend=backend)
    assert_same_bits(case.params, before.params, "params")


@backends
def test_undo_leaves_wide_parameters_alone(backend):
    case = make_case([(50,), (60,)], [torch.float32, torch.bfloat16])
    before = case.clone()
    undo = ops.UndoLog(case.params)
    assert undo.offsets == [-1, 0]
    sgd_step(case, backend, lr=1.0, undo=undo)
    stepped = case.params[0].clone()
    ops.undo_restore_(case.params, undo, backend=backend)
    assert torch.equal(case.params[0], stepped)
    assert_same_bits(case.params[1:], before.params[1:], "params")


@needs_cpp
def test_an_undo_log_of_other_parameters_is_refused(backend):
    undo = ops.UndoLog([torch.zeros(10, dtype=torch.bfloat16)])
    bigger = [torch.zeros(70000, dtype=torch.bfloat16)]
    with pytest.raises(RuntimeError, match="not the one that undo was made for"):
        ops.sgd_(bigger, bigger, lr=0.1, undo=undo, backend=backend)
