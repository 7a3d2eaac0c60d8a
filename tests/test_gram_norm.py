import pytest
import torch

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
# Batch, tokens, in, out. In C++, tiles are 4 x 4 tokens, groups 64 tokens, columns come by 768 and
# segments by 8 * 768.
SHAPES = [(1, 1, 1, 1), (2, 7, 5, 3), (3, 20, 577, 4097), (1, 33, 769, 1), (2, 70, 48, 6200)]


def factors(batch, tokens, width, out, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    dy = torch.randn(batch, tokens, out, generator=generator, dtype=torch.float64)
    return x.to(dtype), (dy * 0.1).to(dtype)


def squared_norms(x, dy, dtype):
    """Of the gradients themselves, formed in `dtype`."""
    return (dy.to(dtype).mT @ x.to(dtype)).square().sum((1, 2))


def torch_grams(x, dy):
    """The same formula in torch, in the compute type."""
    x, dy = (t.to(compute_dtype(t.dtype)) for t in (x, dy))
    return (torch.einsum("bti,bsi->bts", x, x) * torch.einsum("bti,bsi->bts", dy, dy)).sum((1, 2))


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_norm_of_the_gradient(backend, dtype, shape):
    x, dy = factors(*shape, dtype)
    actual = ops.gram_norm(x, dy, backend=backend)
    assert_no_worse(actual, torch_grams(x, dy), squared_norms(x, dy, torch.float64))


def test_without_the_products_of_different_tokens_the_comparison_fails():
    x, dy = factors(2, 7, 5, 3, torch.float32)
    wrong = (x.square().sum(2) * dy.square().sum(2)).sum(1)
    with pytest.raises(AssertionError, match="the oracle"):
        assert_no_worse(wrong, torch_grams(x, dy), squared_norms(x, dy, torch.float64))


@backends
@dtypes
def test_views(backend, dtype):
    x, dy = factors(4, 30, 50, 60, dtype)
    for change in (
        lambda t: t[1:3, 4:25, 3:41],
        lambda t: t[::2, ::3, ::2],
        lambda t: t.transpose(0, 1),
        lambda t: t[:1].expand(3, -1, -1),
    ):
        a, b = change(x), change(dy)
        expected = ops.gram_norm(a.contiguous(), b.contiguous(), backend=backend)
        torch.testing.assert_close(ops.gram_norm(a, b, backend=backend), expected)


@backends
def test_padding_and_neighbours_change_nothing(backend):
    x, dy = factors(3, 11, 40, 30, torch.float32)
    alone = torch.cat([ops.gram_norm(x[i : i + 1], dy[i : i + 1], backend=backend) for i in (0, 2)])
    x[1] *= 1e6
    padded = [torch.nn.functional.pad(t, (0, 0, 2, 3)) for t in (x, dy)]
    torch.testing.assert_close(ops.gram_norm(*padded, backend=backend)[::2], alone)


@backends
def test_tokens_that_cancel_never_give_a_negative_number(backend):
    x, dy = factors(50, 6, 9, 7, torch.float32)
    x, dy = torch.cat([x, x], 1), torch.cat([dy, -dy], 1)
    squared = ops.gram_norm(x, dy, backend=backend)
    assert (squared >= 0).all()
    assert (squared < 1e-5).all()


@backends
def test_what_is_not_finite_shows_in_its_delta_alone(backend):
    x, dy = factors(4, 5, 9, 7, torch.float32)
    finite = ops.gram_norm(x, dy, backend=backend)
    x[1, 2, 3], dy[3, 4, 6] = torch.nan, torch.inf
    actual = ops.gram_norm(x, dy, backend=backend)
    assert actual.isfinite().tolist() == [True, False, True, False]
    torch.testing.assert_close(actual[::2], finite[::2])


@backends
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty(backend, shape):
    x, dy = factors(*shape, torch.bfloat16)
    assert torch.equal(ops.gram_norm(x, dy, backend=backend), torch.zeros(shape[0]))


@needs_cpp
def test_the_number_of_threads_changes_no_bit(backend):
    x, dy = factors(3, 37, 200, 20000, torch.bfloat16)
    results = for_each_number_of_threads(lambda: ops.gram_norm(x, dy, backend=backend))
    assert_same_bits(results[1:], results[:1] * 2, "norms")


@backends
def test_tensors_that_require_gradients_give_one_that_does_not(backend):
    x, dy = (t.requires_grad_() for t in factors(1, 5, 3, 4, torch.float32))
    assert not ops.gram_norm(x, dy, backend=backend).requires_grad


# ---------------------------------------------------------------------------- many pairs


def buffers_of_layers(dtype):
    """X and dY of some layers, (3, 63, width) each, rows of three steps."""
    pairs = [factors(3, 63, *w, dtype, seed=i) for i, w in enumerate([(24, 40), (11, 3), (8, 700)])]
    return [list(tensors) for tensors in zip(*pairs, strict=True)]


@backends
@dtypes
def test_many_pairs_are_as_many_calls_bit_for_bit(backend, dtype):
    xs, dys = ([t[1:, 21:42] for t in each] for each in buffers_of_layers(dtype))
    alone = [ops.gram_norm(x, dy, backend=backend) for x, dy in zip(xs, dys, strict=True)]
    together = ops.gram_norms(xs, dys, backend=backend)
    assert torch.equal(together, torch.stack(alone))
    swapped = ops.gram_norms(xs[::-1], dys[::-1], backend=backend)
    assert torch.equal(swapped.flip(0), together) and not torch.equal(swapped, together)
    xs[0].requires_grad_()
    assert not ops.gram_norms(xs, dys, backend=backend).requires_grad


@backends
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty_pairs(backend, shape):
    x, dy = factors(*shape, torch.float32)
    assert torch.equal(ops.gram_norms([x], [dy], backend=backend), torch.zeros(1, shape[0]))
