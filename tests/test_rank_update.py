import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES, assert_same_bits, row_slices
from ttt_fast import factor_reference, ops, reference
from ttt_fast.rounding import compute_dtype, random_bits, round_stochastic

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HALVES = [torch.bfloat16, torch.float16]


def case(rank, out, width, dtype, *, wide=False, seed=0):
    """weight, x, dy, beta."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    factors = compute_dtype(dtype) if wide else dtype
    x, dy = random(rank, width).to(factors), random(rank, out).to(factors)
    return random(out, width).to(dtype), x, dy, random(rank).to(compute_dtype(dtype))


def integers(rank, out, width, dtype, seed=0):
    """A case whose sums are exact in float32, so that no order of them matters."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, low=-4, high=5):
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    weight = random(out, width, low=-3000, high=3000)
    return weight, random(rank, width), random(rank, out), random(rank).to(compute_dtype(dtype))


def target(weight, x, dy, beta, scale, dtype):
    """What is to be rounded, in `dtype`."""
    x, dy, beta = x.to(dtype), dy.to(dtype), beta.to(dtype)
    product = (dy.t() * beta) @ x
    return scale * weight.to(dtype) + product.reshape(weight.shape)


@dtypes
@pytest.mark.parametrize("wide", [False, True], ids=["storage factors", "wide factors"])
@pytest.mark.parametrize(
    ("rank", "out", "width", "scale"),
    [(1, 1, 1, 1.0), (7, 65, 33, 0.9), (60, 7, 4097, -1.0), (0, 5, 6, 0.5), (3, 0, 4, 1.0)],
)
def test_as_near_to_fp64_as_torch(dtype, wide, rank, out, width, scale):
    args = case(rank, out, width, dtype, wide=wide)
    oracle = target(*args, scale, torch.float64)
    theirs = target(*args, scale, compute_dtype(dtype)).to(dtype)
    ops.rank_update_(*args, scale=scale)
    assert_no_worse(args[0], theirs, oracle)


def test_without_beta_the_comparison_fails():
    args = case(7, 65, 33, torch.float32)
    oracle, theirs = (target(*args, 1.0, d) for d in (torch.float64, torch.float32))
    ops.rank_update_(*args[:3], torch.ones(7))
    with pytest.raises(AssertionError, match="the oracle"):
        assert_no_worse(args[0], theirs, oracle)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounds_once(dtype):
    # At this weight numbers are 2 apart. Each product alone would be lost.
    start = 256.0 if dtype == torch.bfloat16 else 2048.0
    weight = torch.full((1, 1), start, dtype=dtype)
    x, dy = torch.full((2, 1), 0.75, dtype=dtype), torch.ones(2, 1, dtype=dtype)
    ops.rank_update_(weight, x, dy, torch.ones(2))
    assert weight.item() == start + 2
    weight.fill_(start)
    for k in range(2):
        ops.rank_update_(weight, x[k : k + 1], dy[k : k + 1], torch.ones(1))
    assert weight.item() == start


@dtypes
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("elements", [1, 100, 1000, 1 << 20])
def test_blocks_change_no_bit(monkeypatch, dtype, rounding, elements):
    monkeypatch.setattr(factor_reference, "RANK_UPDATE_ELEMENTS", elements)
    weight, *factors = integers(9, 30, 33, dtype)
    exact = target(weight, *factors, 2.0, compute_dtype(dtype))
    expected = exact.to(dtype)
    if rounding == "stochastic":
        bits = random_bits(11, 0, exact.numel(), exact.device)
        expected = round_stochastic(exact, dtype, bits)
    ops.rank_update_(weight, *factors, scale=2.0, rounding=rounding, seed=11)
    assert_same_bits([weight], [expected], "weight")
    if rounding == "stochastic" and dtype in HALVES:
        assert not torch.equal(expected, exact.to(dtype))


@dtypes
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", range(5))
def test_slices_and_strides(monkeypatch, dtype, rounding, kind):
    monkeypatch.setattr(factor_reference, "RANK_UPDATE_ELEMENTS", 500)
    parameter, *_ = integers(1, 96, 96, dtype)
    view = row_slices([parameter] * 5)[kind]
    if kind == 1:  # the weight of a Conv1D is (in, out)
        view = view.permute(1, 2, 0)
    _, *factors = integers(9, view.shape[:-1].numel(), view.shape[-1], dtype)
    around, alone = parameter.clone(), view.clone(memory_format=torch.contiguous_format)
    before = alone.clone()
    ops.rank_update_(alone, *factors, rounding=rounding, seed=3)
    ops.rank_update_(view, *factors, rounding=rounding, seed=3)
    assert_same_bits([view], [alone], "weight")
    if rounding == "nearest":
        exact = target(before, *factors, 1.0, compute_dtype(dtype))
        assert_same_bits([view], [exact.to(dtype)], "weight")
    view.copy_(before)
    assert torch.equal(parameter, around)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nothing_as_large_as_the_weight_is_made(monkeypatch, dtype):
    monkeypatch.setattr(factor_reference, "RANK_UPDATE_ELEMENTS", 1000)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            made = isinstance(result, torch.Tensor) and result.dtype != dtype
            largest = max(largest, result.numel() if made else 0)
            return result

    args = case(3, 300, 50, dtype)
    with Watch():
        reference.rank_update_(*args, rounding="stochastic", seed=0)
    assert 900 <= largest <= 1000


def test_an_update_of_what_requires_gradients_is_none_of_autograd():
    weight, x, dy, beta = case(2, 3, 4, torch.float32)
    weight.requires_grad_()
    ops.rank_update_(weight, x.requires_grad_(), dy, beta)
    assert weight.is_leaf and weight.grad_fn is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(6)}, r"weight has shape \(6,\); it must be \(out, in\)"),
        ({"x": torch.ones(2, 5)}, r"x has shape \(2, 5\); it must be \(R, in\) with in = 4"),
        ({"dy": torch.ones(3, 3)}, r"dy has shape .* must be \(R, out\) with R = 2, out = 3"),
        ({"beta": torch.ones(3)}, r"beta has shape \(3,\); it must be \(R\) with R = 2"),
        ({"x": torch.ones(2, 4).double()}, "x is float64; it must be float32"),
        ({"weight": torch.ones(3, 4).int()}, "int32 are not supported"),
        ({"dy": torch.ones(2, 3, device="meta")}, "dy is on meta"),
        ({"rounding": "torch"}, "rounding='torch' is unknown; use 'nearest' or 'stochastic'"),
    ],
)
def test_refusals(change, message):
    args = dict(zip(("weight", "x", "dy", "beta"), case(2, 3, 4, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        ops.rank_update_(**(args | change))
