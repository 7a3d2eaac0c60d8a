import pytest
import torch

from tests.interpreter.compilations import Launches, kernel_of
from tests.test_rank_update import HALVES, case, integers, target
from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES, assert_same_bits, row_slices
from ttt_fast import reference
from ttt_fast.kernels import rank_update
from ttt_fast.kernels.rank_update import CASES, rank_update_launch
from ttt_fast.rounding import compute_dtype

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
roundings = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])


@dtypes
@pytest.mark.parametrize("wide", [False, True], ids=["storage factors", "wide factors"])
@pytest.mark.parametrize(
    ("rank", "out", "width", "scale"),
    [(1, 1, 1, 1.0), (7, 65, 33, 0.9), (37, 5, 130, -1.0), (0, 5, 6, 0.5), (3, 0, 4, 1.0)],
)
def test_as_near_to_fp64_as_torch(fenced, dtype, wide, rank, out, width, scale):
    args = [fenced(t) for t in case(rank, out, width, dtype, wide=wide)]
    oracle = target(*args, scale, torch.float64)
    theirs = target(*args, scale, compute_dtype(dtype)).to(dtype)
    rank_update_launch(*args, scale=scale)
    assert_no_worse(args[0], theirs, oracle)


def test_without_beta_the_comparison_fails():
    args = case(7, 65, 33, torch.float32)
    oracle, theirs = (target(*args, 1.0, d) for d in (torch.float64, torch.float32))
    rank_update_launch(*args[:3], torch.ones(7))
    with pytest.raises(AssertionError, match="the oracle"):
        assert_no_worse(args[0], theirs, oracle)


@dtypes
@roundings
def test_the_bits_of_the_reference(fenced, dtype, rounding):
    """Sums are exact in float32 here, whatever their order."""
    weight, *factors = integers(40, 67, 70, dtype)
    expected, plain = weight.clone(), weight.clone()
    reference.rank_update_(expected, *factors, scale=2.0, rounding=rounding, seed=11)
    reference.rank_update_(plain, *factors, scale=2.0, rounding="nearest")
    weight = fenced(weight)
    rank_update_launch(weight, *factors, scale=2.0, rounding=rounding, seed=11)
    assert_same_bits([weight], [expected], "weight")
    # The two roundings differ, and so do seeds.
    if rounding == "stochastic" and dtype in HALVES:
        assert not torch.equal(expected, plain)
        other = integers(40, 67, 70, dtype)[0]
        rank_update_launch(other, *factors, scale=2.0, rounding=rounding, seed=12)
        assert not torch.equal(expected, other)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_is_right_on_average(dtype):
    """Of steps of a tenth of the distance between numbers, one in ten is taken."""
    weight = torch.full((64, 64), 256.0 if dtype == torch.bfloat16 else 2048.0, dtype=dtype)
    before, ones = weight.clone(), torch.ones(2, 64, dtype=dtype)
    rank_update_launch(weight, ones, ones, torch.full((2,), 0.1), rounding="stochastic", seed=5)
    # 4096 trials of p = 0.1: a standard deviation is 0.0047.
    taken = (weight != before).double().mean().item()
    assert 0.08 < taken < 0.12
    assert weight.max() == before[0, 0] + 2


@dtypes
@roundings
@pytest.mark.parametrize("kind", range(5))
def test_slices_and_strides(dtype, rounding, kind):
    parameter, *_ = integers(1, 96, 96, dtype)
    view = row_slices([parameter] * 5)[kind]
    if kind == 1:  # the weight of a Conv1D is (in, out)
        view = view.permute(1, 2, 0)
    _, *factors = integers(9, view.shape[:-1].numel(), view.shape[-1], dtype)
    around, before, alone = parameter.clone(), view.clone(), view.clone()
    reference.rank_update_(alone, *factors, rounding=rounding, seed=3)
    rank_update_launch(view, *factors, rounding=rounding, seed=3)
    assert_same_bits([view], [alone], "weight")
    view.copy_(before)
    assert torch.equal(parameter, around)


@dtypes
def test_factors_are_rows_of_larger_buffers(dtype):
    weight, x, dy, beta = integers(9, 20, 24, dtype)
    expected, other = weight.clone(), weight.clone()
    rank_update_launch(expected, x, dy, beta)

    def inside(t):
        larger = torch.full([n + 5 for n in t.shape], torch.nan).to(t.dtype)
        return larger[tuple(slice(2, 2 + n) for n in t.shape)].copy_(t)

    rank_update_launch(weight, *map(inside, (x, dy, beta)))
    assert torch.equal(weight, expected)
    x, dy = (t.t().contiguous().t() for t in (x, dy))
    rank_update_launch(other, x, dy, beta.repeat_interleave(2)[::2])
    assert torch.equal(other, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_from_the_device(dtype):
    weight, *factors = case(5, 20, 24, dtype)
    expected = weight.clone()
    rank_update_launch(expected, *factors, scale=0.75)
    rank_update_launch(weight, *factors, scale=torch.tensor([0.75], dtype=compute_dtype(dtype)))
    assert torch.equal(weight, expected)


@dtypes
def test_large_tiles(monkeypatch, dtype):
    monkeypatch.setattr(rank_update, "MANY_TILES", 0)
    weight, *factors = integers(40, 131, 130, dtype)
    expected = weight.clone()
    reference.rank_update_(expected, *factors, rounding="stochastic", seed=2)
    rank_update_launch(weight, *factors, rounding="stochastic", seed=2)
    assert_same_bits([weight], [expected], "weight")


def share_of_wrong_roundings(dtype):
    """How many entries are not the oracle, rounded."""
    weight, *factors = case(50, 40, 60, dtype)
    oracle = target(weight, *factors, 0.0, torch.float64)
    rank_update_launch(weight, *factors, scale=0.0)
    return (weight != oracle.to(dtype)).double().mean().item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_product_is_rounded_once(dtype):
    assert share_of_wrong_roundings(dtype) < 0.02


def test_one_term_is_not_enough(monkeypatch):
    constants = rank_update._constants
    monkeypatch.setattr(rank_update, "_constants", lambda *args: constants(*args) | {"TERMS": 1})
    assert share_of_wrong_roundings(torch.bfloat16) > 0.2


def test_float16_products_keep_their_digits_however_small():
    """Powers of two that leave the sum as it is; float16 itself has no number below 6e-8."""
    weight, x, dy, beta = case(7, 20, 24, torch.float16)
    shifted = weight.clone()
    rank_update_launch(weight, x, dy, beta)
    rank_update_launch(shifted, x * 2.0**8, dy, beta * 2.0**-8)
    assert torch.equal(weight, shifted)


@pytest.mark.parametrize("stochastic", [False, True])
def test_one_kernel_serves_every_rank(monkeypatch, stochastic):
    kernels = [
        Launches(rank_update.rank_update_kernel),
        Launches(rank_update.rank_update_kernel, do_not_specialize=()),
    ]
    for kernel in kernels:
        monkeypatch.setattr(rank_update, "rank_update_kernel", kernel)
        weight, x, dy, beta = case(400, 64, 48, torch.bfloat16)
        for step, rank in enumerate((0, 1, 2, 15, 16, 20, 400)):
            rank_update_launch(
                weight, x[:rank], dy[:rank], beta[:rank], scale=1.0 - step / 8, seed=step,
                rounding="stochastic" if stochastic else "nearest",
            )  # fmt: skip
    # And the count notices ranks that are specialised.
    assert len(kernels[0].kernels) == 1 < len(kernels[1].kernels)


def test_the_machine_code_gate_compiles_what_is_launched(monkeypatch):
    kernel = Launches(rank_update.rank_update_kernel)
    monkeypatch.setattr(rank_update, "rank_update_kernel", kernel)
    for many in (0, 1000):
        monkeypatch.setattr(rank_update, "MANY_TILES", many)
        for dtype in DTYPES:
            weight, *factors = case(20, 64, 48, dtype)
            for rounding in ("nearest", "stochastic"):
                rank_update_launch(weight, *factors, rounding=rounding)
                rank_update_launch(weight.t().contiguous().t(), *factors, rounding=rounding)
    assert [c.name for c in CASES if kernel_of(c) not in kernel.kernels] == []
    assert kernel_of(CASES[0]._replace(num_stages=9)) not in kernel.kernels
