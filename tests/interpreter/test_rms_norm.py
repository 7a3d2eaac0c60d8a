import pytest
import torch

from tests.interpreter.compilations import Launches, kernel_of
from tests.test_rms_norm import EPS, assert_right, case, rounding
from tests.update_cases import DTYPES
from ttt_fast import ops
from ttt_fast.kernels import rms_norm, rms_norm_backward
from ttt_fast.kernels.rms_norm import Tiles, rms_norm_launch, tiles_for
from ttt_fast.kernels.rms_norm_backward import rms_norm_backward_launch

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Batch, tokens, width. A tile has 2048 elements (float64: 1024), or one row; rows of more than 8192
# columns (4096 if odd, 2048 in float64) are swept, eight at a time.
SHAPES = [(1, 1, 3), (3, 7, 577), (2, 70, 64), (1, 3, 4096), (1, 9, 4111), (2, 0, 5), (0, 3, 5)]


@pytest.fixture
def long_spans(monkeypatch):
    """Programs take as many tiles as where there are programs enough."""
    monkeypatch.setattr(rms_norm_backward, "ENOUGH_PROGRAMS", 1)


@pytest.fixture
def fenced_results(monkeypatch, fenced):
    """What a launch allocates ends at a protected page."""
    stock = torch.Tensor.new_empty

    def new_empty(tensor, *sizes, **options):
        # With options it is the interpreter that asks.
        return stock(tensor, *sizes, **options) if options else fenced(tensor.new_zeros(sizes))

    monkeypatch.setattr(torch, "empty_like", fenced)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def launched(x, weight, dy, round_first=False):
    """y, dx and dweight."""
    y, rstd = rms_norm_launch(x, weight, eps=EPS, round_first=round_first)
    return y, *rms_norm_backward_launch(dy, x, weight, rstd, round_first=round_first)


@dtypes
@rounding
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_to_fp64_as_torch(dtype, round_first, shape):
    x, weight, dy = case(shape, dtype)
    options = {"round_first": round_first, "backend": "triton"}
    y, rstd = ops.rms_norm(x, weight, eps=EPS, **options)
    gradients = ops.rms_norm_backward(dy, x, weight, rstd, **options)
    assert_right((y, *gradients), x, weight, dy, round_first)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 150, 70), (1, 20, 1030)], ids=str)
def test_programs_that_take_many_tokens(long_spans, dtype, shape):
    inputs = case(shape, dtype)
    assert_right(launched(*inputs), *inputs, False)


def test_a_program_that_takes_the_wrong_tokens_is_noticed(monkeypatch):
    inputs = case((2, 9, 40), torch.float32)
    assert_right(launched(*inputs), *inputs, False)
    monkeypatch.setattr(rms_norm_backward, "_span", lambda *_: 5)
    monkeypatch.setattr(rms_norm_backward.triton, "cdiv", lambda n, span: n // span)
    with pytest.raises(AssertionError, match="the oracle"):
        assert_right(launched(*inputs), *inputs, False)


@pytest.mark.parametrize(
    ("width", "dtype", "tiles"),
    [
        (1, torch.bfloat16, Tiles(32, 64, 4, False)),
        (128, torch.bfloat16, Tiles(16, 128, 4, False)),
        (576, torch.float32, Tiles(2, 1024, 4, False)),
        (4096, torch.float16, Tiles(1, 4096, 8, False)),
        (8192, torch.bfloat16, Tiles(1, 8192, 16, False)),
        (8208, torch.bfloat16, Tiles(8, 1024, 16, True)),
        (4095, torch.bfloat16, Tiles(1, 4096, 8, False)),
        (4097, torch.bfloat16, Tiles(8, 512, 8, True)),
        (64, torch.float64, Tiles(16, 64, 4, False)),
        (2049, torch.float64, Tiles(8, 256, 8, True)),
    ],
)
def test_rows_are_in_registers_where_they_fit(width, dtype, tiles):
    assert tiles_for(width, dtype) == tiles


@pytest.mark.parametrize(
    ("width", "tokens", "batch", "span"),
    [(4096, 20, 1, 1), (4096, 20, 50, 2), (4096, 20000, 1, 16), (64, 20000, 1, 64),
     (16384, 20000, 1, 8)],
)  # fmt: skip
def test_spans_are_as_long_as_leaves_enough_programs(width, tokens, batch, span):
    tiles = tiles_for(width, torch.bfloat16)
    assert rms_norm_backward._span(tiles, tokens, batch) == span


@dtypes
def test_views(dtype):
    x, weight, dy = case((6, 12, 144), dtype)
    for change in (
        lambda t: t[1:3],
        lambda t: t[1:4:2],
        lambda t: t[..., 16:80],
        lambda t: t[..., 3:50:2],
        lambda t: t[:1].expand(3, *t.shape[1:]),
    ):
        inputs = tuple(map(change, (x, weight, dy)))
        assert_right(launched(*inputs), *inputs, False)
    inputs = x[:, 2:9].transpose(0, 1)[:3], weight[:3], dy[:, 2:9].transpose(0, 1)[:3]
    assert_right(launched(*inputs), *inputs, False)


@dtypes
@pytest.mark.parametrize("shape", [(2, 5, 577), (2, 40, 64), (1, 9, 4111)], ids=str)
def test_touches_nothing_outside(fenced, fenced_results, long_spans, dtype, shape):
    inputs = [fenced(t) for t in case(shape, dtype)]
    assert_right(launched(*inputs), *inputs, False)


def test_the_order_of_programs_changes_no_bit(program_order):
    for shape in ((2, 20, 1030), (1, 20, 4111)):
        results = []
        for seed in range(2):
            with program_order(seed):
                results.append(launched(*case(shape, torch.float32)))
        assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("width", [65, 4111])
def test_what_is_not_finite_shows_in_its_token_and_its_delta_alone(width):
    x, weight, dy = case((3, 5, width), torch.float32)
    clean = launched(x, weight, dy)
    x[1, 2, 7] = torch.nan
    y, dx, dweight = launched(x, weight, dy)
    for rows in (y, dx):
        broken = rows.isnan().all(-1)
        assert broken.nonzero().tolist() == [[1, 2]] == rows.isnan().any(-1).nonzero().tolist()
    assert dweight.isnan().any(1).tolist() == [False, True, False]
    for actual, expected in zip((y, dx, dweight), clean, strict=True):
        assert torch.equal(actual[::2], expected[::2])


def test_rows_of_one_column():
    x, weight = torch.tensor([[[3.0], [-2.0]]]), torch.tensor([[0.5]])
    y, rstd = rms_norm_launch(x, weight, eps=0.0, round_first=False)
    dx, dweight = rms_norm_backward_launch(x, x, weight, rstd, round_first=False)
    assert y.flatten().tolist() == [0.5, -0.5]
    assert dx.flatten().tolist() == [0.0, 0.0] and dweight.tolist() == [[5.0]]


def test_tokens_of_zeros_are_divided_by_eps():
    x, weight, dy = case((1, 3, 20), torch.float32)
    y, dx, dweight = launched(torch.zeros_like(x), weight, dy)
    assert not y.any() and not dweight.any()
    torch.testing.assert_close(dx, dy * weight * EPS**-0.5)


@pytest.mark.parametrize("width", [130, 4111])
def test_one_kernel_serves_every_number_of_tokens(monkeypatch, width):
    forward = Launches(rms_norm.rms_norm_kernel)
    backward = Launches(rms_norm_backward.rms_norm_backward_kernel)
    finish = Launches(rms_norm_backward.rms_norm_finish_kernel)
    monkeypatch.setattr(rms_norm, "rms_norm_kernel", forward)
    monkeypatch.setattr(rms_norm_backward, "rms_norm_backward_kernel", backward)
    monkeypatch.setattr(rms_norm_backward, "rms_norm_finish_kernel", finish)
    for tokens in (1, 2, 16, 17, 300):
        launched(*case((2, tokens, width), torch.bfloat16))
    assert forward.count == backward.count == 5
    assert len(forward.kernels) == len(backward.kernels) == len(finish.kernels) == 1


def test_the_machine_code_gate_compiles_what_is_launched(monkeypatch):
    cases = [*rms_norm.CASES, *rms_norm_backward.CASES]
    modules = {c.kernel.__name__: rms_norm_backward for c in cases} | {"rms_norm_kernel": rms_norm}
    kernels = {name: Launches(getattr(module, name)) for name, module in modules.items()}
    for name, kernel in kernels.items():
        monkeypatch.setattr(modules[name], name, kernel)
    for dtype in DTYPES:
        for width in (64, 1024, 2048, 4095, 4096, 4097, 8192, 16384):
            launched(*case((1, 40, width), dtype), round_first=True)
    launches = set().union(*(kernel.kernels for kernel in kernels.values()))
    assert [c.name for c in cases if kernel_of(c) not in launches] == []
    assert kernel_of(cases[0]._replace(num_stages=9)) not in launches
