import pytest
import torch

from tests.interpreter.compilations import Launches, kernel_of
from tests.test_delta_linear import case, in_columns, oracle, same_dtype, without_weight
from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES
from ttt_fast import reference
from ttt_fast.kernels import delta_linear
from ttt_fast.kernels.delta_linear import CASES, TILES, delta_linear_launch, tiles_for

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KINDS = {"rows": lambda args: args, "columns": in_columns, "no weight": without_weight}
# How W lies; batch, tokens, rank, in, out: one of everything; deltas that share a tile; no rank, no
# input; sums in several parts; a last tile of one row, one column, one rank.
SHAPES = [
    ("rows", 1, 1, 1, 1, 1), ("columns", 1, 7, 60, 33, 65), ("rows", 3, 11, 33, 40, 33),
    ("no weight", 3, 11, 33, 40, 33), ("columns", 5, 1, 7, 129, 4), ("columns", 3, 20, 0, 9, 8),
    ("rows", 2, 3, 4, 0, 5), ("rows", 1, 17, 40, 150, 16), ("no weight", 2, 3, 0, 4, 5),
]  # fmt: skip


def judged(args):
    """The same case for the oracle, with a weight of zeros where there is none."""
    x, weight, a, d, *rest = args
    weight = x.new_zeros(d.shape[2], x.shape[2]) if weight is None else weight
    return x, weight, a, d, *rest


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_to_fp64_as_torch(fenced, dtype, shape):
    kind, *shape = shape
    rho = shape[1] % 2 == 1
    args = KINDS[kind]([None if t is None else fenced(t) for t in case(*shape, dtype, rho=rho)])
    actual = delta_linear_launch(*args)
    assert actual.is_contiguous() and actual.dtype == dtype
    args = judged(args)
    assert_no_worse(actual, same_dtype(*args), oracle(*args))


def test_the_comparison_notices_the_delta_of_a_neighbour():
    args = case(3, 7, 12, 33, 65, torch.float32)
    x, weight, a, d, beta, rho = args
    wrong = delta_linear_launch(x, weight, a, d.roll(1, 0), beta, rho)
    with pytest.raises(AssertionError, match="the oracle"):
        assert_no_worse(wrong, same_dtype(*args), oracle(*args))


def rows_of_each_tile(dtype):
    """Numbers of rows for which the tiles are the first, the second, ... of a type."""
    return [*(t.rows - 5 for t in TILES[dtype][:-1]), 2 * TILES[dtype][-2].rows + 1]


@dtypes
def test_every_size_of_tile(dtype):
    assert [tiles_for(rows, dtype) for rows in rows_of_each_tile(dtype)] == list(TILES[dtype])
    # What a product reads of the scores was written, whatever tiles they were computed in.
    assert all(t.columns % u.rank_depth == 0 for t in TILES[dtype] for u in TILES[dtype])
    for rows in rows_of_each_tile(dtype):
        args = case(1, rows, 35, 70, 45, dtype)
        assert_no_worse(delta_linear_launch(*args), same_dtype(*args), oracle(*args), f"{rows}")


@dtypes
def test_views_of_larger_buffers(dtype):
    """Nothing behind the rank is used, nor beside a part of a buffer: it is NaN there."""
    x, weight, a, d, beta, rho = args = case(3, 6, 9, 24, 18, dtype, spare=5)

    def inside(t):
        larger = torch.full([n + 5 for n in t.shape], torch.nan).to(t.dtype)
        view = larger[tuple(slice(2, 2 + n) for n in t.shape)]
        return view.copy_(t)

    expected = delta_linear_launch(x, weight, a.contiguous(), d.contiguous(), beta, rho)
    assert torch.equal(delta_linear_launch(*args), expected)
    assert torch.equal(delta_linear_launch(*map(inside, args[:5]), rho), expected)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in args]
    assert torch.equal(delta_linear_launch(*strided), expected)
    shared = [t[:1].expand(3, -1, -1) for t in (a, d)]
    copied = [t.contiguous() for t in shared]
    assert torch.equal(
        delta_linear_launch(x, weight, *shared, beta, rho),
        delta_linear_launch(x, weight, *copied, beta, rho),
    )


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_x_is_kept_behind_the_rows_of_a(fenced, dtype, shape):
    kind, *shape = shape
    batch, tokens, rank, width, _ = shape
    x, weight, a, *rest = KINDS[kind](case(*shape, dtype))
    # The last row of the last delta ends where the memory does.
    buffer = fenced(torch.full((batch, rank + tokens, width), torch.nan).to(dtype))
    buffer[:, :rank] = a
    append = buffer[:, rank:]
    y = delta_linear_launch(x, weight, buffer[:, :rank], *rest, append)
    assert torch.equal(append, x) and torch.equal(buffer[:, :rank], a)
    assert torch.equal(y, delta_linear_launch(x, weight, a, *rest))


def test_swapped_factors_give_the_gradient_at_the_input():
    x, weight, a, d, beta, rho = case(2, 6, 10, 8, 5, torch.float64, spare=4)
    dy = torch.randn(2, 6, 5, dtype=torch.float64)
    expected = reference.delta_linear(dy, weight.t(), d, a, beta, rho)
    actual = delta_linear_launch(dy, weight.t(), d, a, beta, rho)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("where", ["x", "a", "d", "beta"])
def test_what_is_not_finite_stays_in_its_delta(dtype, poison, where):
    """Deltas share tiles: 0 times what another one has is not 0 when that is NaN."""
    args = dict(
        zip(("x", "weight", "a", "d", "beta", "rho"), case(3, 5, 4, 9, 6, dtype), strict=True)
    )
    clean = delta_linear_launch(**args)
    args[where] = args[where].clone()
    args[where][1, 2] = poison
    y = delta_linear_launch(**args)
    # Of x it is a single token.
    hit = torch.zeros(3, 5, dtype=torch.bool)
    hit[1, 2 if where == "x" else slice(None)] = True
    assert torch.equal(~y.isfinite(), hit[..., None].expand_as(y))
    assert torch.equal(y[~hit], clean[~hit])


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_a_sum_in_several_parts(monkeypatch, programs):
    monkeypatch.setattr(delta_linear, "SCORE_PROGRAMS", programs)
    for dtype in (torch.float32, torch.bfloat16):
        args = case(1, 5, 40, 300, 20, dtype)
        assert_no_worse(delta_linear_launch(*args), same_dtype(*args), oracle(*args))


@dtypes
def test_the_order_of_programs_changes_no_bit(program_order, dtype):
    args = case(3, 9, 40, 70, 70, dtype)
    results = []
    for seed in range(2):
        with program_order(seed):
            results.append(delta_linear_launch(*args))
    assert all(torch.equal(result, results[0]) for result in results)


# ---------------------------------------------------------------------------- rounding


def share_of_wrong_roundings(dtype):
    """How many entries of a delta alone are not the oracle, rounded."""
    args = judged(without_weight(case(2, 16, 50, 40, 60, dtype, rho=False)))
    actual = delta_linear_launch(args[0], None, *args[2:])
    return (actual != oracle(*args).to(dtype)).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_delta_is_rounded_once(monkeypatch, dtype):
    """A sum with an error of 2⁻¹⁸ rounds another way once in hundreds of times, not often."""
    assert share_of_wrong_roundings(dtype) < 0.02
    monkeypatch.setitem(delta_linear.SCORES, dtype, (dtype, 1))
    assert share_of_wrong_roundings(dtype) > 0.2


def test_a_small_delta_outlives_the_rounding_to_bfloat16():
    """Rounded once: 1 + 2⁻⁸ + 2⁻⁸, each lost on its own, is the next number after 1."""
    x, weight = torch.ones(1, 1, 2).bfloat16(), torch.tensor([[1.0, 2.0**-8]]).bfloat16()
    a, d = torch.tensor([[[1.0, 0.0]]]).bfloat16(), torch.ones(1, 1, 1).bfloat16()
    y = delta_linear_launch(x, weight, a, d, torch.full((1, 1), -(2.0**-8)))
    assert y.item() == 1 + 2.0**-7


def test_float16_scores_keep_their_digits_however_small(monkeypatch):
    """Powers of two that leave y as it is; float16 itself has no number below 6e-8."""
    x, _, a, d, beta, _ = case(1, 4, 6, 8, 10, torch.float16)
    shifted = x, None, a, d * 2.0**16, beta * 2.0**-16
    assert torch.equal(delta_linear_launch(*shifted), delta_linear_launch(x, None, a, d, beta))
    monkeypatch.setitem(delta_linear.SCORES, torch.float16, (torch.float16, 1))
    assert not torch.equal(delta_linear_launch(*shifted), delta_linear_launch(x, None, a, d, beta))


# ---------------------------------------------------------------------------- compilation


RANKS = (1, 2, 15, 16, 20, 40, 128, 129, 400)


def watched(monkeypatch, **options):
    """What takes down the launches of the two kernels."""
    kernels = []
    for name in ("scores_kernel", "delta_linear_kernel"):
        kernels.append(Launches(getattr(delta_linear, name), **options))
        monkeypatch.setattr(delta_linear, name, kernels[-1])
    return kernels


def launch_at(ranks):
    """As the steps of a prompt do: with more and more rows of the same buffers."""
    x, weight, a, d, beta, rho = case(2, 20, max(ranks) + 20, 48, 64, torch.bfloat16)
    for rank in ranks:
        given = a[:, :rank], d[:, :rank], beta[:, :rank].contiguous(), rho
        delta_linear_launch(x, weight, *given, a[:, rank : rank + 20])


def test_one_kernel_serves_every_rank(monkeypatch):
    scores, products = watched(monkeypatch)
    launch_at((0, *RANKS))
    assert (scores.count, products.count) == (len(RANKS), len(RANKS) + 1)
    assert (len(scores.kernels), len(products.kernels)) == (1, 1)


def test_the_count_notices_ranks_that_are_specialised(monkeypatch):
    scores, products = watched(monkeypatch, do_not_specialize=())
    launch_at(RANKS)
    assert len(scores.kernels) > 1 and len(products.kernels) > 1


def test_prompts_of_another_length_share_kernels_too(monkeypatch):
    kernels = watched(monkeypatch)
    for tokens in (17, 20, 31, 32):
        delta_linear_launch(*case(1, tokens, 5, 48, 64, torch.bfloat16))
    assert [len(kernel.kernels) for kernel in kernels] == [1, 1]


def test_the_machine_code_gate_compiles_what_is_launched(monkeypatch):
    scores, products = watched(monkeypatch)
    for dtype in DTYPES:
        for tokens in rows_of_each_tile(dtype):
            args = case(1, tokens, 20, 48, 64, dtype)
            append = torch.zeros(1, tokens, 48, dtype=dtype)
            delta_linear_launch(*args)
            delta_linear_launch(*args, append)
            delta_linear_launch(*in_columns(args), append)
    launched = scores.kernels | products.kernels
    assert [c.name for c in CASES if kernel_of(c) not in launched] == []
    assert kernel_of(CASES[0]._replace(num_stages=9)) not in launched
