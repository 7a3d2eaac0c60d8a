import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import assert_no_worse
from tests.update_cases import (
    DTYPES,
    assert_same_bits,
    backend_params,
    for_each_number_of_threads,
)
from ttt_fast import ops
from ttt_fast.rounding import compute_dtype

backends = pytest.mark.parametrize("backend", backend_params())
needs_cpp = pytest.mark.parametrize("backend", backend_params()[1:])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
IGNORED = -100


def case(tokens, vocabulary, dtype, scale=4.0, seed=0):
    """Logits, and targets of which some are the likeliest token and some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * scale
    logits = logits.to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[1::3] = logits[1::3].argmax(1)
    targets[2::3] = IGNORED
    return logits, targets


def stock(logits, targets, dtype):
    """Losses in `dtype` and gradients in the dtype of the logits, or both in float64."""
    wide = logits.detach().to(dtype).requires_grad_()
    losses = F.cross_entropy(wide, targets, reduction="none", ignore_index=IGNORED)
    losses.sum().backward()
    return losses.detach(), wide.grad if dtype == torch.float64 else wide.grad.to(logits.dtype)


@backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (4, 65), (5, 4097), (0, 9)], ids=str)
def test_as_near_to_fp64_as_cross_entropy(backend, dtype, shape):
    logits, targets = case(*shape, dtype)
    oracle = stock(logits, targets, torch.float64)
    theirs = stock(logits, targets, compute_dtype(dtype))
    losses = ops.nll_(logits, targets, backend=backend)
    assert_no_worse(losses, theirs[0], oracle[0], "losses")
    assert_no_worse(logits, theirs[1], oracle[1], "gradients")


def test_the_comparison_finds_a_target_off_by_one():
    logits, targets = case(7, 65, torch.float32)
    oracle = stock(logits, targets, torch.float64)
    theirs = stock(logits, targets, torch.float32)
    ops.nll_(logits, torch.where(targets > 0, targets - 1, targets))
    with pytest.raises(AssertionError, match="the oracle"):
        assert_no_worse(logits, theirs[1], oracle[1])


@backends
@pytest.mark.parametrize("gap", [8.0, 16.0, 30.0, 60.0])
def test_a_prompt_that_is_almost_known_keeps_its_digits(backend, gap):
    logits, _ = case(3, 1000, torch.float32, scale=0.5)
    logits[:, 77] += gap
    targets = torch.full((3,), 77)
    # softmax - 1 has no digit left at a gap of 17 in float32, of 37 in float64.
    theirs = stock(logits, targets, torch.float32)[1][:, 77]
    rest = torch.cat([logits[:, :77], logits[:, 78:]], 1).double().logsumexp(1)
    lead = rest - logits[:, 77].double()
    losses = ops.nll_(logits, targets, backend=backend)
    torch.testing.assert_close(losses.double(), lead.exp().log1p(), rtol=2e-5, atol=0)
    torch.testing.assert_close(logits[:, 77].double(), -lead.sigmoid(), rtol=2e-5, atol=0)
    if gap >= 16.0:
        assert not torch.allclose(theirs.double(), -lead.sigmoid(), rtol=1e-3, atol=0)


@backends
@dtypes
def test_ignored_rows_are_zero_whatever_they_hold(backend, dtype):
    logits, targets = case(7, 50, dtype)
    logits[2], logits[5, 3] = torch.nan, torch.inf
    losses = ops.nll_(logits, targets, backend=backend)
    assert losses.isfinite().all()
    assert logits.isfinite().all()
    assert (losses[2::3] == 0).all()
    assert (logits[2::3] == 0).all()
    assert (logits[0::3] != 0).any()
    logits, _ = case(4, 9, dtype)
    assert torch.equal(
        ops.nll_(logits, torch.full((4,), 5), ignore_index=5, backend=backend),
        torch.zeros(4, dtype=compute_dtype(dtype)),
    )
    assert torch.equal(logits, torch.zeros_like(logits))


@backends
@dtypes
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[2:6],
        lambda t: t[::3],
        lambda t: t[3:7, 1:1500],
        lambda t: t[:5, ::3],
        lambda t: t[:, :6].t(),
    ],
    ids=["rows", "every third row", "columns", "every third column", "transposed"],
)
def test_views(backend, dtype, view):
    around, _ = case(9, 2049, dtype)
    before = around.clone()
    inside = view(around)
    targets = torch.arange(2 * len(inside))[::2] % inside.shape[1]  # strided as well
    expected = inside.clone(memory_format=torch.contiguous_format)
    losses = ops.nll_(expected, targets.clone(), backend=backend)
    # torch's exponential of a strided tensor differs from that of a contiguous one in the last bit.
    tolerance = {"rtol": 0.0, "atol": 0.0} if backend == "cpp" else {}
    close = torch.testing.assert_close
    close(ops.nll_(inside, targets, backend=backend), losses, **tolerance)
    close(inside, expected, **tolerance)
    view(before).copy_(inside)
    assert torch.equal(around, before)


@backends
@dtypes
def test_negligible_gradients_are_zero(backend, dtype):
    # 2^-100 is e^-69.3.
    logits = torch.tensor([[0.0, -69.0, -70.0, -87.5, -100.0, -torch.inf]]).to(dtype)
    fits = dtype != torch.float16  # whose smallest number is 2^-24
    actual = logits.clone()
    ops.nll_(actual, torch.tensor([1]), backend=backend)
    assert (actual != 0).tolist() == [[True, True, False, False, False, False]]
    actual = logits.clone()
    losses = ops.nll_(actual, torch.tensor([0]), backend=backend)
    assert (actual != 0).tolist() == [[fits, fits, False, False, False, False]]
    assert 0 < losses.item() < 2e-30
    actual = logits[:, ::2].clone()
    losses = ops.nll_(actual, torch.tensor([0]), backend=backend)
    assert torch.equal(actual, torch.zeros_like(actual))
    assert losses.item() < 1e-30


@backends
@dtypes
def test_no_result_is_denormal(backend, dtype):
    logits = torch.linspace(0, -110, 4097, dtype=torch.float64).to(dtype).repeat(2, 1)
    ops.nll_(logits, torch.tensor([0, 4000]), backend=backend)
    sizes = logits.double().abs()
    smallest = 2.0**-24 if dtype == torch.float16 else 2.0**-100.01
    assert (sizes == 0).any()
    assert sizes[sizes > 0].min() >= smallest


@backends
@dtypes
def test_what_is_not_finite_shows_in_its_row_alone(backend, dtype):
    clean, _ = case(8, 1500, dtype)
    targets = torch.arange(8)
    logits = clean.clone()
    logits[1, 1400] = torch.nan
    logits[2, 2] = torch.nan  # the target
    logits[3, 1400] = torch.inf
    logits[4, 4] = torch.inf
    logits[5] = -torch.inf
    logits[6, 6] = -torch.inf
    expected = ops.nll_(clean, targets, backend=backend)
    losses = ops.nll_(logits, targets, backend=backend)
    assert losses.isfinite().tolist() == [True] + [False] * 6 + [True]
    assert losses[6] == torch.inf
    assert logits[1:6].isnan().any(1).all()
    assert torch.equal(losses[::7], expected[::7])
    assert torch.equal(logits[::7], clean[::7])


@backends
@dtypes
def test_a_token_that_cannot_be_takes_no_probability(backend, dtype):
    logits, targets = case(4, 80, dtype)
    short = logits[:, :70].clone()
    targets %= 70
    logits[:, 70:] = -torch.inf
    losses = ops.nll_(logits, targets, backend=backend)
    torch.testing.assert_close(losses, ops.nll_(short, targets, backend=backend))
    torch.testing.assert_close(logits[:, :70], short)
    assert (logits[:, 70:] == 0).all()


@backends
@pytest.mark.parametrize("wrong", [-1, 9, -(2**40), 2**40])
def test_a_target_out_of_range_is_refused(backend, wrong):
    logits, _ = case(3, 9, torch.float32)
    before = logits.clone()
    targets = torch.tensor([0, IGNORED, wrong])
    with pytest.raises(ValueError, match=rf"targets\[2\] is {wrong}; it must be between 0 and 8"):
        ops.nll_(logits, targets, backend=backend)
    assert torch.equal(logits, before)
    # Where nobody looks first, it reads nothing foreign.
    losses = torch.ops.ttt_fast.nll_(logits, targets, ignore_index=IGNORED, backend=backend)
    assert losses.isnan().tolist() == [False, False, True]
    assert logits[2].isnan().all()


@needs_cpp
@dtypes
def test_the_number_of_threads_changes_no_bit(backend, dtype):
    logits, targets = case(70, 4097, dtype)

    def run():
        gradients = logits.clone()
        return [ops.nll_(gradients, targets, backend=backend), gradients]

    results = for_each_number_of_threads(run)
    for result in results[1:]:
        assert_same_bits(result, results[0], "losses and gradients")


def test_the_reference_by_blocks_of_rows(monkeypatch):
    logits, targets = case(11, 33, torch.float32)
    whole = logits.clone()
    expected = ops.nll_(whole, targets, backend="torch")
    monkeypatch.setattr("ttt_fast.reference.NLL_ELEMENTS", 100)
    assert torch.equal(ops.nll_(logits, targets, backend="torch"), expected)
    assert torch.equal(logits, whole)
