import pytest
import torch

from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES, backend_params, for_each_number_of_threads
from ttt_fast import ops
from ttt_fast.rounding import compute_dtype

backends = pytest.mark.parametrize("backend", backend_params())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
rounding = pytest.mark.parametrize("round_first", [False, True], ids=["round last", "round first"])
# Batch, tokens, width. In C++, sums have 64 lanes and weights' gradients are summed by 16 tokens.
SHAPES = [(1, 1, 3), (3, 7, 577), (2, 130, 64), (1, 20, 63), (2, 0, 5)]
EPS = 1e-5


def case(shape, dtype, seed=0):
    """x, weight and dy; rows of x differ in size by orders."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= 10.0 ** torch.randint(-2, 3, (*shape[:2], 1), generator=generator)
    weight = 1 + 0.3 * torch.randn(shape[0], shape[2], generator=generator, dtype=torch.float64)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(compute_dtype(dtype)), dy.to(dtype)


def plain(x, weight, round_first):
    """The formula in operations of torch, for autograd."""
    wide = x.to(weight.dtype)
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    normalised = normalised.to(x.dtype) if round_first else normalised
    return (weight[:, None] * normalised).to(x.dtype)


def plain_gradients(x, weight, dy, round_first):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = plain(x, weight, round_first)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def assert_right(results, x, weight, dy, round_first):
    """y, dx and dweight are as near to fp64 as those of torch."""
    theirs = plain_gradients(x, weight, dy, round_first)
    oracle = plain_gradients(x.double(), weight.double(), dy.double(), round_first)
    for name, ours, torchs, exact in zip(
        ("y", "dx", "dweight"), results, theirs, oracle, strict=True
    ):
        # Rounding x / rms first is an error of the storage type in a sum of the compute type.
        if name == "dweight" and round_first and x.dtype in (torch.bfloat16, torch.float16):
            ours, torchs = ours.to(x.dtype), torchs.to(x.dtype)
        assert_no_worse(ours, torchs, exact, name)


@backends
@dtypes
@rounding
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_both_gradients(backend, dtype, round_first, shape):
    x, weight, dy = case(shape, dtype)
    options = {"round_first": round_first, "backend": backend}
    y, rstd = ops.rms_norm(x, weight, eps=EPS, **options)
    gradients = ops.rms_norm_backward(dy, x, weight, rstd, **options)
    assert_right((y, *gradients), x, weight, dy, round_first)


def test_a_wrong_gradient_is_noticed():
    x, weight, dy = case((3, 7, 577), torch.float32)
    theirs = plain_gradients(x, weight, dy, False)
    exact = plain_gradients(x.double(), weight.double(), dy.double(), False)
    _, rstd = ops.rms_norm(x, weight, eps=EPS)
    without_mean = (dy * weight[:, None]) * rstd[..., None]
    with pytest.raises(AssertionError, match="the oracle"):
        assert_no_worse(without_mean, theirs[1], exact[1])


def test_backends_agree_on_where_to_round():
    x, weight, _ = case((3, 7, 577), torch.bfloat16)
    results = {
        (backend.values[0], first): ops.rms_norm(
            x, weight, eps=EPS, round_first=first, backend=backend.values[0]
        )[0]
        for backend in backend_params()
        for first in (False, True)
    }
    first, last = results["torch", True], results["torch", False]
    assert not torch.equal(first, last)
    for (_, round_first), y in results.items():
        # A value in the middle of two may go either way with the last bit of the sum.
        assert (y != (first if round_first else last)).float().mean() < 1e-2


@pytest.mark.parametrize("backend", backend_params()[1:])
def test_results_do_not_depend_on_the_number_of_threads(backend):
    x, weight, dy = case((4, 300, 577), torch.float32)

    def run():
        y, rstd = ops.rms_norm(x, weight, eps=EPS, backend=backend)
        return [y, *ops.rms_norm_backward(dy, x, weight, rstd, backend=backend)]

    first, *others = for_each_number_of_threads(run)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(5, 7)), r"x has shape \(5, 7\); it must be \(B, M, D\)"),
        (dict(weight=torch.ones(2, 6)), r"weight has shape \(2, 6\).*D = 7"),
        (dict(weight=torch.ones(2, 7, dtype=torch.float64)), "weight is float64.*float32"),
        (dict(rstd=torch.ones(2, 4)), r"rstd has shape \(2, 4\)"),
        (dict(dy=torch.ones(2, 5, 7, dtype=torch.bfloat16)), "dy is bfloat16.*float32"),
    ],
)
def test_bad_arguments(change, message):
    good = dict(dy=torch.ones(2, 5, 7), x=torch.ones(2, 5, 7), weight=torch.ones(2, 7))
    arguments = good | dict(rstd=torch.ones(2, 5)) | change
    with pytest.raises(ValueError, match=message):
        ops.rms_norm_backward(**arguments)
