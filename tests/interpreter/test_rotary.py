import pytest
import torch

from tests.interpreter.compilations import Launches, kernel_of
from tests.test_rotary import SHAPES, case, wide_angles
from tests.update_cases import DTYPES, assert_same_bits
from ttt_fast import ops
from ttt_fast.kernels import rotary
from ttt_fast.kernels.rotary import Tile, rotary_launch, tile_for

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def launched(x, cos, sin, dy):
    """y, and the gradient at x."""
    return [
        rotary_launch(x, cos, sin, transposed=False),
        rotary_launch(dy, cos, sin, transposed=True),
    ]


def expected(x, cos, sin, dy):
    """The reference's."""
    options = {"backend": "torch"}
    return [
        ops.rotary(x, cos, sin, **options),
        ops.rotary(dy, cos, sin, transposed=True, **options),
    ]


@dtypes
@wide_angles
@pytest.mark.parametrize("shape", [*SHAPES, (1, 40, 2, 128, 128)], ids=str)
def test_the_bits_of_the_reference(dtype, wide, shape):
    inputs = case(shape, dtype, wide)
    results = launched(*inputs)
    assert_same_bits(results, expected(*inputs), "rotary")
    assert [t.stride() for t in results] == [t.stride() for t in expected(*inputs)]


def test_heads_that_are_left_out_are_noticed(monkeypatch):
    inputs = case((1, 40, 2, 128, 128), torch.float32)
    assert_same_bits(launched(*inputs), expected(*inputs), "rotary")
    monkeypatch.setattr(rotary.triton, "cdiv", lambda n, taken: n // taken)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(launched(*inputs), expected(*inputs), "rotary")


@dtypes
def test_views(dtype):
    x, cos, sin, dy = case((4, 5, 9, 40, 24), dtype)
    for rows, heads, tokens, columns in (
        (slice(1, 3), slice(None), slice(None), slice(None)),
        (slice(0, 4, 2), slice(1, 4), slice(0, 9, 2), slice(None)),
        (slice(None), slice(0, 5, 2), slice(2, 3), slice(3, 33)),
        (slice(2, 3), slice(2, 3), slice(1, 9), slice(8, 40)),
    ):
        inputs = (
            x[rows, heads, tokens, columns], cos[rows, tokens], sin[rows, tokens],
            dy[rows, heads, tokens, columns].contiguous(),
        )  # fmt: skip
        assert_same_bits(launched(*inputs), expected(*inputs), "views")


def test_angles_of_one_row_are_those_of_all():
    inputs = case((3, 2, 5, 8, 8), torch.bfloat16, rows=1)
    assert_same_bits(launched(*inputs), expected(*inputs), "rows")


@dtypes
@wide_angles
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 10, 6), (1, 9, 3, 64, 64), (1, 17, 3, 96, 24)], ids=str
)
def test_touches_nothing_outside(fenced, monkeypatch, dtype, wide, shape):
    inputs = [fenced(t.contiguous()) for t in case(shape, dtype, wide)]
    right = expected(*inputs)
    monkeypatch.setattr(torch, "empty_like", fenced)
    assert_same_bits(launched(*inputs), right, "rotary")


@pytest.mark.parametrize(
    ("heads", "turned", "width", "tile"),
    [
        (32, 128, 128, Tile(16, 64, 128, 4)),
        (8, 128, 128, Tile(8, 64, 128, 2)),
        (9, 64, 64, Tile(16, 32, 64, 2)),
        (16, 24, 96, Tile(16, 12, 96, 1)),
        (1, 0, 8, Tile(1, 0, 8, 1)),
        (128, 64, 64, Tile(32, 32, 64, 4)),
        (4, 4096, 4096, Tile(1, 2048, 4096, 4)),
    ],
)
def test_tiles(heads, turned, width, tile):
    assert tile_for(heads, turned, width) == tile


def test_one_kernel_serves_every_number_of_tokens(monkeypatch):
    kernel = Launches(rotary.rotary_kernel)
    monkeypatch.setattr(rotary, "rotary_kernel", kernel)
    for tokens in (1, 2, 16, 17, 300):
        for batch in (1, 2):
            launched(*case((batch, 9, tokens, 64, 64), torch.bfloat16))
    # One for each direction.
    assert kernel.count == 20 and len(kernel.kernels) == 2


def test_the_machine_code_gate_compiles_what_is_launched(monkeypatch):
    kernel = Launches(rotary.rotary_kernel)
    monkeypatch.setattr(rotary, "rotary_kernel", kernel)
    for dtype in DTYPES:
        for wide in (False, True):
            for heads, width, turned in ((32, 128, 128), (9, 64, 64), (16, 64, 16), (32, 96, 24)):
                launched(*case((3, heads, 5, width, turned), dtype, wide))
    assert [c.name for c in rotary.CASES if kernel_of(c) not in kernel.kernels] == []
    assert kernel_of(rotary.CASES[0]._replace(num_stages=9)) not in kernel.kernels
