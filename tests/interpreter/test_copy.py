import pytest
import torch

from tests.test_copy import random_bytes, same_bytes
from tests.update_cases import DTYPES, assert_same_bits, row_slices
from ttt_fast import ops
from ttt_fast.kernels import copy
from ttt_fast.kernels.copy import BLOCK, copy_launch

SIZES = [(0,), (1,), (7,), (), (3, 5, 7), (2 * BLOCK + 1,), (BLOCK,)]


@pytest.mark.parametrize(
    "dtype", [*DTYPES, torch.int8, torch.bool, torch.int64, torch.complex64], ids=str
)
def test_is_bit_exact(dtype):
    srcs = [random_bytes(shape, torch.int8 if dtype == torch.bool else dtype) for shape in SIZES]
    if dtype == torch.bool:
        srcs = [src > 0 for src in srcs]
    dsts = [torch.zeros_like(s) for s in srcs]
    ops.copy_(dsts, srcs, backend="triton")
    assert all(same_bytes(d.view(-1), s.view(-1)) for d, s in zip(dsts, srcs, strict=True))


@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_touches_nothing_outside(fenced, at_start, offset):
    src = random_bytes((BLOCK + 4099,), torch.int16)
    dst = fenced(torch.zeros_like(src), at_start=at_start)
    src = fenced(src, at_start=at_start)
    copy_launch([dst[offset:]], [src[offset:]])
    assert torch.equal(dst[offset:], src[offset:])
    assert not dst[:offset].any()


def test_sizes_dtypes_and_alignments_share_a_call(monkeypatch):
    srcs = [random_bytes((n,), d, seed=n) for n in (5, BLOCK + 3) for d in (*DTYPES, torch.int8)]
    dsts = [torch.zeros(s.numel() + 1, dtype=s.dtype)[1:] for s in srcs[:5]]
    dsts += [torch.zeros_like(s) for s in srcs[5:]]
    launches = []
    tables = copy.pointer_tables
    monkeypatch.setattr(
        copy, "pointer_tables", lambda *a, **k: launches.extend(tables(*a, **k)) or tables(*a, **k)
    )
    copy_launch(dsts, srcs)
    assert all(same_bytes(d, s) for d, s in zip(dsts, srcs, strict=True))
    # Four sizes of elements, aligned or not; both 16-bit types are one.
    assert len(launches) == 8


def test_between_strided_views():
    srcs = row_slices([random_bytes((96, 96), torch.int32, seed=i) for i in range(5)])
    dsts = row_slices([torch.zeros(96, 96, dtype=torch.int32) for _ in range(5)])
    around = [d._base.clone() for d in dsts]
    copy_launch(dsts, srcs)
    for dst, src, before in zip(dsts, srcs, around, strict=True):
        assert torch.equal(dst, src)
        dst.zero_()
        assert torch.equal(dst._base, before)


def test_short_rows_are_not_cut_into_chunks(monkeypatch):
    seen = []
    tables = copy.pointer_tables
    monkeypatch.setattr(
        copy, "pointer_tables", lambda lists, *a, **k: seen.append(lists) or tables(lists, *a, **k)
    )
    wide = torch.arange(64 * 64.0).view(64, 64)
    dsts, srcs = [torch.zeros(64, 64), torch.zeros(64, 32)], [wide.t(), wide[:, :32]]
    copy_launch(dsts, srcs)
    assert torch.equal(dsts[0], srcs[0]) and torch.equal(dsts[1], srcs[1])
    assert [len(tensors) for tensors in seen[0]] == [1, 1]


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_converts_as_torch_does(dtype, to):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 20, (5000,), generator=generator).double()
    src = (torch.randn(5000, generator=generator).double() * exponents.exp2()).to(dtype)
    special = [torch.nan, torch.inf, -torch.inf, -0.0, 1 + 2.0**-8, 1 + 2.0**-11, 1e300, 65520.0]
    # Half way between two of 16 bits but for a bit that float32 has not: rounded twice.
    special += [1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40]
    src[: len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)
    actual, expected = torch.zeros(5000, dtype=to), torch.zeros(5000, dtype=to)
    copy_launch([actual], [src])
    expected.copy_(src)
    assert_same_bits([actual], [expected], "converted")


def test_what_is_not_floating_point_is_converted_too():
    dst = torch.zeros(5)
    copy_launch([dst], [torch.arange(5)])
    assert dst.tolist() == [0, 1, 2, 3, 4]


def test_of_nothing_and_of_itself():
    ops.copy_([], [], backend="triton")
    x = random_bytes((1000,), torch.int32)
    before = x.clone()
    ops.copy_([x], [x], backend="triton")
    assert torch.equal(x, before)


def test_an_expanded_destination_is_refused():
    with pytest.raises(ValueError, match=r"dsts\[0\] is expanded"):
        copy_launch([torch.zeros(1, 64).expand(3, 64)], [torch.zeros(3, 64)])
