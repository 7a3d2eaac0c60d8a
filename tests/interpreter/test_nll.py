import pytest
import torch

from tests.test_nll import IGNORED, case, stock
from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES
from ttt_fast import ops
from ttt_fast.kernels.nll import nll_launch
from ttt_fast.rounding import compute_dtype

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_right(logits, targets, losses, before):
    oracle = stock(before, targets, torch.float64)
    theirs = stock(before, targets, compute_dtype(before.dtype))
    assert_no_worse(losses, theirs[0], oracle[0], "losses")
    assert_no_worse(logits, theirs[1], oracle[1], "gradients")


# A block has 1024 (float64) to 4096 (16 bits) places and begins at a multiple of 16 bytes.
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (3, 4096), (9, 4097), (0, 9)], ids=str)
def test_as_near_to_fp64_as_cross_entropy(dtype, shape):
    logits, targets = case(*shape, dtype)
    before = logits.clone()
    assert_right(logits, targets, ops.nll_(logits, targets, backend="triton"), before)


def test_the_comparison_finds_a_target_off_by_one():
    logits, targets = case(7, 65, torch.float32)
    before = logits.clone()
    losses = nll_launch(logits, torch.where(targets > 0, targets - 1, targets))
    with pytest.raises(AssertionError, match="the oracle"):
        assert_right(logits, targets, losses, before)


@dtypes
@pytest.mark.parametrize("at_start", [False, True])
def test_touches_nothing_outside(fenced, dtype, at_start):
    logits, targets = case(3, 4099, dtype)
    before = logits.clone()
    logits = fenced(logits, at_start=at_start)
    assert_right(logits, targets, nll_launch(logits, fenced(targets)), before)


@pytest.mark.parametrize("gap", [8.0, 16.0, 60.0])
def test_a_prompt_that_is_almost_known_keeps_its_digits(gap):
    logits, _ = case(3, 1000, torch.float32, scale=0.5)
    logits[:, 77] += gap
    rest = torch.cat([logits[:, :77], logits[:, 78:]], 1).double().logsumexp(1)
    lead = rest - logits[:, 77].double()
    losses = nll_launch(logits, torch.full((3,), 77))
    torch.testing.assert_close(losses.double(), lead.exp().log1p(), rtol=2e-5, atol=0)
    torch.testing.assert_close(logits[:, 77].double(), -lead.sigmoid(), rtol=2e-5, atol=0)


@dtypes
def test_ignored_rows_are_zero_whatever_they_hold(fenced, dtype):
    logits, targets = case(7, 4099, dtype)
    logits[2], logits[5, 3] = torch.nan, torch.inf
    logits = fenced(logits)
    losses = nll_launch(logits, targets)
    assert losses.isfinite().all() and logits.isfinite().all()
    assert (losses[2::3] == 0).all() and (logits[2::3] == 0).all()
    assert (logits[0::3] != 0).any()
    losses = nll_launch(logits, torch.full((7,), 5), ignore_index=5)
    assert torch.equal(losses, torch.zeros(7, dtype=compute_dtype(dtype)))
    assert not logits.any()


@dtypes
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[2:6],
        lambda t: t[::3],
        lambda t: t[3:7, 1:1500],
        lambda t: t[:5, ::3],
        lambda t: t[:, :6].t(),
        lambda t: t[:, 4:5],
    ],
    ids=["rows", "every third row", "columns", "every third column", "transposed", "one column"],
)
def test_views(dtype, view):
    around, _ = case(9, 2049, dtype)
    expected = around.clone()
    inside = view(around)
    targets = torch.arange(2 * len(inside))[::2] % inside.shape[1]  # strided as well
    before = inside.clone()
    assert_right(inside, targets, nll_launch(inside, targets), before)
    view(expected).copy_(inside)
    assert torch.equal(around, expected)


@dtypes
def test_negligible_gradients_are_zero(dtype):
    # 2^-100 is e^-69.3.
    logits = torch.tensor([[0.0, -69.0, -70.0, -87.5, -100.0, -torch.inf]]).to(dtype)
    fits = dtype != torch.float16  # whose smallest number is 2^-24
    actual = logits.clone()
    nll_launch(actual, torch.tensor([1]))
    assert (actual != 0).tolist() == [[True, True, False, False, False, False]]
    actual = logits.clone()
    losses = nll_launch(actual, torch.tensor([0]))
    assert (actual != 0).tolist() == [[fits, fits, False, False, False, False]]
    assert 0 < losses.item() < 2e-30


@dtypes
def test_what_is_not_finite_shows_in_its_row_alone(dtype):
    clean, _ = case(8, 4100, dtype)
    targets = torch.arange(8)
    logits = clean.clone()
    logits[1, 1400] = torch.nan
    logits[2, 2] = torch.nan  # the target
    logits[3, 1400] = torch.inf
    logits[4, 4] = torch.inf
    logits[5] = -torch.inf
    logits[6, 6] = -torch.inf
    expected = nll_launch(clean, targets)
    losses = nll_launch(logits, targets)
    assert losses.isfinite().tolist() == [True] + [False] * 6 + [True]
    assert losses[6] == torch.inf
    assert logits[1:6].isnan().any(1).all()
    assert torch.equal(losses[::7], expected[::7])
    assert torch.equal(logits[::7], clean[::7])


@dtypes
def test_a_block_of_tokens_that_cannot_be(dtype):
    logits, targets = case(4, 80, dtype)
    short = logits.clone()
    logits = torch.cat([torch.full((4, 5000), -torch.inf).to(dtype), logits], 1)
    losses = nll_launch(logits, torch.where(targets == IGNORED, targets, targets + 5000))
    torch.testing.assert_close(losses, nll_launch(short, targets))
    torch.testing.assert_close(logits[:, 5000:], short)
    assert not logits[:, :5000].any()


@pytest.mark.parametrize("wrong", [-1, 9, -(2**40), 2**40])
def test_a_target_out_of_range_makes_its_row_nan(fenced, wrong):
    logits, _ = case(3, 9, torch.float32)
    logits = fenced(logits)
    losses = nll_launch(logits, torch.tensor([0, IGNORED, wrong]))
    assert losses.isnan().tolist() == [False, False, True]
    assert logits.isnan().all(1).tolist() == [False, False, True]


def test_expanded_logits_are_refused():
    with pytest.raises(ValueError, match="rows share memory"):
        nll_launch(torch.ones(1, 3).expand(2, 3), torch.ones(2).long())
