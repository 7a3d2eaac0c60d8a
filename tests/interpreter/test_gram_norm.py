import pytest
import torch

from tests.test_gram_norm import factors, squared_norms, torch_grams
from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES
from ttt_fast import ops
from ttt_fast.kernels import gram_norm
from ttt_fast.kernels.gram_norm import gram_norm_launch, gram_norms_launch

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Batch, tokens, in, out. Tiles have 16 tokens where programs are few; rounds are 128 bytes wide.
SHAPES = [(1, 1, 1, 1), (2, 7, 5, 3), (3, 20, 137, 50), (1, 33, 72, 1), (2, 40, 48, 136)]


@pytest.fixture
def large_tiles(monkeypatch):
    """Choose tiles as where there are programs enough."""
    monkeypatch.setattr(gram_norm, "ENOUGH_PROGRAMS", 1)


def assert_right(actual, x, dy):
    assert_no_worse(actual, torch_grams(x, dy), squared_norms(x, dy, torch.float64))


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_norm_of_the_gradient(dtype, shape):
    x, dy = factors(*shape, dtype)
    assert_right(ops.gram_norm(x, dy, backend="triton"), x, dy)


@dtypes
@pytest.mark.parametrize("tokens", [20, 70], ids=str)
def test_large_tiles(large_tiles, dtype, tokens):
    x, dy = factors(2, tokens, 72, 24, dtype)
    assert_right(gram_norm_launch(x, dy), x, dy)


def test_a_tile_that_nobody_computes_is_noticed(monkeypatch):
    x, dy = factors(2, 40, 24, 16, torch.float32)
    options, tiles = gram_norm._options(40, 2, torch.float32)
    assert tiles == 6
    monkeypatch.setattr(gram_norm, "_options", lambda *_: (options, tiles - 1))
    with pytest.raises(AssertionError, match="the oracle"):
        assert_right(gram_norm_launch(x, dy), x, dy)


@pytest.mark.parametrize(
    ("tokens", "deltas", "dtype", "tile"),
    [
        (1, 1, torch.bfloat16, 16),
        (64, 1, torch.bfloat16, 16),
        (64, 50, torch.bfloat16, 32),
        (64, 200, torch.bfloat16, 64),
        (20, 200, torch.bfloat16, 32),
        (16, 200, torch.bfloat16, 16),
        (2000, 1, torch.bfloat16, 64),
        (2000, 1, torch.float64, 32),
    ],
)
def test_tiles_are_as_large_as_leaves_enough_programs(tokens, deltas, dtype, tile):
    assert gram_norm._options(tokens, deltas, dtype)[0]["TILE"] == tile


@dtypes
def test_views(dtype):
    x, dy = factors(4, 30, 56, 64, dtype)
    for change in (
        lambda t: t[1:3, 4:25, 8:40],  # aligned, read where it lies
        lambda t: t[1:3, 4:25, 3:41],
        lambda t: t[::2, ::3, ::2],
        lambda t: t.transpose(0, 1)[:3],
        lambda t: t[:1, :5].expand(3, -1, -1),
    ):
        a, b = change(x), change(dy)
        assert_right(gram_norm_launch(a, b), a, b)


def test_only_odd_rows_are_copied():
    x, _ = factors(2, 5, 48, 1, torch.bfloat16)
    for view in (x, x[:, 1:3, 8:32], x[:1], x[:, :1, 16:]):
        assert gram_norm._aligned(view) is view
    for view in (x[:, :, 1:33], x[:, :, :47], x[:, :, ::2]):
        copy = gram_norm._aligned(view)
        assert copy.shape[2] % 8 == 0
        assert torch.equal(copy[:, :, : view.shape[2]], view)
        assert not copy[:, :, view.shape[2] :].any()


@dtypes
def test_touches_nothing_outside(fenced, dtype):
    x, dy = factors(2, 35, 40, 24, dtype)
    expected = gram_norm_launch(x, dy)
    assert torch.equal(gram_norm_launch(fenced(x), fenced(dy)), expected)


def test_the_order_of_programs_changes_no_bit(program_order):
    x, dy = factors(2, 40, 24, 16, torch.float32)
    results = []
    for seed in range(3):
        with program_order(seed):
            results.append(gram_norm_launch(x, dy))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_tokens_that_cancel_never_give_a_negative_number(large_tiles):
    x, dy = factors(10, 17, 9, 7, torch.float32)
    x, dy = torch.cat([x, x], 1), torch.cat([dy, -dy], 1)
    norms = [gram_norm_launch(x, dy), gram_norm_launch(x.repeat(1, 2, 1), dy.repeat(1, 2, 1))]
    for norm in norms:  # of one tile of 64 tokens, and of three
        assert (norm >= 0).all()
        assert (norm < 1e-4).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("tokens", [5, 20])
def test_what_is_not_finite_shows_in_its_delta_alone(tokens):
    x, dy = factors(4, tokens, 9, 7, torch.float32)
    finite = gram_norm_launch(x, dy)
    x[1, 2, 3], dy[3, 4, 6] = torch.nan, torch.inf
    actual = gram_norm_launch(x, dy)
    assert actual.isfinite().tolist() == [True, False, True, False]
    assert torch.equal(actual[::2], finite[::2])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty(shape):
    x, dy = factors(*shape, torch.bfloat16)
    assert torch.equal(gram_norm_launch(x, dy), torch.zeros(shape[0]))
    if shape[0] == 2:
        whole = factors(*(n or 1 for n in shape[:2]), 8, 8, torch.bfloat16)
        pairs = [(x, dy)] if shape[1] == 0 else [(x, dy), whole]
        assert torch.equal(gram_norms_launch(pairs)[0], torch.zeros(2))


@dtypes
def test_many_pairs_in_one_launch(dtype):
    pairs = [factors(2, 20, *w, dtype, seed=i) for i, w in enumerate([(24, 40), (11, 3)])]
    alone = torch.stack([gram_norm_launch(*pair) for pair in pairs])
    for _ in range(2):  # the second time with a table that is there
        assert torch.equal(gram_norms_launch(pairs), alone)


def test_pairs_that_differ_are_refused():
    pairs = [factors(2, tokens, 8, 8, torch.float32) for tokens in (3, 4)]
    with pytest.raises(ValueError, match="2 pairs of 2 kinds"):
        gram_norms_launch(pairs)
    with pytest.raises(ValueError, match="0 pairs of 0 kinds"):
        gram_norms_launch([])
