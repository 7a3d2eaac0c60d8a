"""products.linear: x Wᵀ by the product that reads W as it lies, or by torch's."""

import pytest
import torch
from torch.nn import functional as F

from tests.tolerances import assert_no_worse
from ttt_fast.backend import available_backends
from ttt_fast.engines import products
from ttt_fast.engines.products import TILE_SIDE, linear

LINEAR_SHAPES = [(5, 33), (1, 1, 33), (2, 7, 33), (33,), (2, 3, 2, 33), (256, 33)]


def is_ours(monkeypatch, x, weight, most=256):
    """Whether linear takes our product for these, of up to so many rows, and its result."""
    calls = []

    def most_rows(dtype, by_rows, tiled):
        return 0 if dtype == torch.bfloat16 and not tiled else most

    monkeypatch.setattr(products, "most_rows", most_rows)
    real = products._as_it_lies
    monkeypatch.setattr(products, "_as_it_lies", lambda op: (calls.append(op), real(op))[1])
    y = linear(x, weight)
    return bool(calls), y


@pytest.mark.parametrize("columns", [False, True], ids=["W by rows", "W by columns"])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear_of_few_rows(monkeypatch, shape, columns):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(65, 33, generator=generator)
    if columns:
        weight = weight.t().contiguous().t()
    ours, y = is_ours(monkeypatch, x, weight)
    assert ours
    assert_no_worse(y, F.linear(x, weight), F.linear(x.double(), weight.double()))
    # Of an x that is a part of something, or turned, too.
    for other in (
        x.repeat_interleave(2, -1)[..., ::2],
        x.movedim(-1, 0).contiguous().movedim(0, -1),
    ):
        assert torch.equal(linear(other, weight), y)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((257, 33), torch.float32), ((19, 27, 33), torch.float32), ((5, 33), torch.float64),
     ((5, 33), torch.bfloat16), ((5, 32), torch.bfloat16), ((5, 33), torch.float16),
     ((0, 33), torch.float32), ((2, 0, 33), torch.float32)],
    ids=str,
)  # fmt: skip
def test_linear_of_everything_else_is_torchs(monkeypatch, shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(65, shape[-1]).to(dtype)
    known = products.most_rows(dtype)
    assert (known > 0) <= (dtype in (torch.float32, torch.bfloat16))
    assert products.most_rows(dtype, tiled=False) <= known
    most = 256 if dtype in (torch.float32, torch.bfloat16) else known
    ours, y = is_ours(monkeypatch, x, weight, most)
    assert not ours
    assert torch.equal(y, F.linear(x, weight))


@pytest.mark.parametrize("columns", [False, True], ids=["W by rows", "W by columns"])
@pytest.mark.parametrize(("width", "out"), [(32, 64), (96, 32), (1024, 160), (576, 192)])
@pytest.mark.parametrize("rows", [1, 16, 20, 33, 70])
def test_linear_in_bfloat16_rounds_once(monkeypatch, rows, width, out, columns):
    """Where the processor has tiles, by them; elsewhere by the product that the op has there."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, width, generator=generator).bfloat16() for n in (rows, out))
    if columns:
        weight = weight.t().contiguous().t()
    ours, y = is_ours(monkeypatch, x, weight)
    assert ours and width % TILE_SIDE == 0
    exact = x.double() @ weight.double().t()
    terms = x.double().abs() @ weight.double().abs().t()
    # Half a unit of bfloat16, and of the sum in float32 what it may be off.
    bound = exact.abs() * 2**-8 + terms * 2**-24 * width
    assert bool(((y.double() - exact).abs() <= bound).all())
    # A token's sums are the same whatever is beside it, and NaN stays with its own.
    assert torch.equal(linear(x[-1:], weight), y[-1:])
    x[0] = float("nan")
    assert linear(x, weight)[0].isnan().all() and torch.equal(linear(x, weight)[1:], y[1:])


def test_many_rows_of_float32_are_ours_only_where_tiles_take_them():
    if available_backends()["cpp"] != "ok":
        pytest.skip("the C++ extension is not built")
    x = torch.zeros(300, 64)
    tiles = torch.ops.ttt_fast_cpp.has_tiles()
    assert products.reads_as_it_lies(x, torch.zeros(96, 64), 300) == tiles
    assert not products.reads_as_it_lies(x, torch.zeros(95, 64), 300)


def test_linear_of_a_weight_that_lies_in_neither_order(monkeypatch):
    x, weight = torch.randn(5, 33), torch.randn(130, 66)[::2, ::2]
    ours, y = is_ours(monkeypatch, x, weight)
    assert not ours
    assert torch.equal(y, F.linear(x, weight))


def test_linear_without_inputs():
    x, weight = torch.randn(5, 0), torch.randn(6, 0)
    assert torch.equal(linear(x, weight), torch.zeros(5, 6))
