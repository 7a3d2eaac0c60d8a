import pytest
import torch

from tests.update_cases import (
    DTYPES,
    assert_same_bits,
    backend_params,
    for_each_number_of_threads,
)
from ttt_fast import ops
from ttt_fast.rounding import compute_dtype

backends = pytest.mark.parametrize("backend", backend_params())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
wide_angles = pytest.mark.parametrize("wide", [False, True], ids=["angles as x", "wide angles"])
# Batch, heads, tokens, width, and how many columns are turned.
SHAPES = [
    (1, 1, 1, 2, 2), (2, 3, 5, 64, 64), (1, 9, 20, 64, 64), (3, 2, 7, 40, 10), (2, 5, 4, 7, 6),
    (1, 17, 3, 96, 24), (2, 3, 4, 8, 0), (0, 2, 3, 8, 8), (2, 0, 3, 8, 8), (2, 2, 0, 8, 8),
]  # fmt: skip


def case(shape, dtype, wide=False, rows=None, seed=0):
    """An x as a projection gives it, cos and sin whose halves differ, and dy."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, tokens, width, turned = shape
    x, dy = torch.randn(2, batch, tokens, heads, width, generator=generator).to(dtype)
    angles = torch.randn(batch if rows is None else rows, tokens, turned, generator=generator)
    angle = compute_dtype(dtype) if wide else dtype
    return x.transpose(1, 2), angles.cos().to(angle), angles.sin().to(angle), dy.transpose(1, 2)


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def models_own(x, cos, sin):
    """What models do, in their operations and their order."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([((turned * cos) + (rotate_half(turned) * sin)).to(x.dtype), rest], -1)


def both(x, cos, sin, dy, **options):
    """y, and the gradient at x for dy."""
    return ops.rotary(x, cos, sin, **options), ops.rotary(dy, cos, sin, transposed=True, **options)


@backends
@dtypes
@wide_angles
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_the_models_own_code(backend, dtype, wide, shape):
    x, cos, sin, dy = case(shape, dtype, wide)
    x.requires_grad_()
    y, dx = both(x.detach(), cos, sin, dy, backend=backend)
    expected = models_own(x, cos, sin)
    assert_same_bits([y], [expected], "y")
    if not wide or compute_dtype(dtype) == dtype:
        (theirs,) = torch.autograd.grad(expected, x, dy)
        # A zero may have either sign: autograd adds others to it.
        assert_same_bits([dx + 0], [theirs + 0], "dx")


@dtypes
@wide_angles
def test_a_product_of_another_rounding_is_noticed(dtype, wide):
    if compute_dtype(dtype) == dtype:
        return
    x, cos, sin, _ = case((2, 3, 5, 64, 64), dtype, wide)
    angle = dtype if wide else torch.float32
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(
            [ops.rotary(x, cos.to(angle), sin.to(angle))], [models_own(x, cos, sin)], "y"
        )


@backends
@pytest.mark.parametrize("turned", [8, 12])
def test_backward_is_the_transpose_whatever_the_halves(backend, turned):
    x, cos, sin, dy = case((2, 3, 5, 12, turned), torch.float64)
    y, dx = both(x, cos, sin, dy, backend=backend)
    torch.testing.assert_close((y * dy).sum(), (x * dx).sum(), rtol=1e-13, atol=1e-13)
    # With other sines in the halves, those of the forward negated are something else.
    negated = ops.rotary(dy, cos, -sin, backend=backend)
    assert not torch.allclose(negated, dx)
    cos, sin = (torch.cat([t[..., : turned // 2]] * 2, -1) for t in (cos, sin))
    _, dx = both(x, cos, sin, dy, backend=backend)
    assert torch.equal(ops.rotary(dy, cos, -sin, backend=backend), dx)


@backends
@dtypes
def test_a_rotation_is_undone_by_its_transpose(backend, dtype):
    x, cos, sin, _ = case((2, 3, 5, 16, 12), torch.float64)
    half = torch.linspace(0, 3, 6, dtype=torch.float64)
    angles = torch.cat((half, half)) * torch.arange(5)[:, None]
    cos, sin = angles.cos()[None].to(dtype), angles.sin()[None].to(dtype)
    y = ops.rotary(x.to(dtype), cos, sin, backend=backend)
    back = ops.rotary(y, cos, sin, transposed=True, backend=backend)
    eps = torch.finfo(dtype).eps
    assert (back.double() - x.to(dtype).double()).abs().max() < 8 * eps * x.abs().max()
    assert (y.double() - x.to(dtype).double()).abs().max() > 0.1


@backends
@dtypes
def test_views_give_the_same_bits_in_the_layout_that_torch_gives(backend, dtype):
    x, cos, sin, dy = case((3, 4, 6, 20, 12), dtype)
    expected = both(x, cos, sin, dy, backend=backend)
    fused = torch.randn(3, 6, 4, 50).to(dtype)
    fused[..., 7:27], fused[..., 27:47] = x.transpose(1, 2), dy.transpose(1, 2)
    wider = torch.randn(2, 3, 9, 20).to(dtype)
    wider[0, :, :6, 3:15], wider[1, :, :6, 3:15] = cos, sin
    angles = wider[:, :, :6, 3:15]
    for views in (
        (x.contiguous(), cos, sin, dy.contiguous()),
        (fused[..., 7:27].transpose(1, 2), *angles, fused[..., 27:47].transpose(1, 2)),
        (x.mT.contiguous().mT, cos.mT.contiguous().mT, sin, dy.mT.contiguous().mT),
    ):
        results = both(*views, backend=backend)
        assert_same_bits(list(results), list(expected), "views")
        for result, view in zip(results, (views[0], views[3]), strict=True):
            rows = view if view.stride(-1) == 1 else view.contiguous()
            assert result.stride() == (rows * 2).stride()


@backends
def test_angles_of_one_row_are_those_of_all(backend):
    x, cos, sin, dy = case((3, 2, 5, 8, 8), torch.bfloat16, rows=1)
    one = both(x, cos, sin, dy, backend=backend)
    each = both(x, *(t.expand(3, -1, -1) for t in (cos, sin)), dy, backend=backend)
    assert_same_bits(list(one), list(each), "rows")


@backends
def test_nothing_but_its_pair_sees_a_nan(backend):
    x, cos, sin, _ = case((2, 3, 4, 10, 8), torch.float32)
    x[1, 2, 3, 1] = torch.nan
    x[0, 0, 0, 9] = torch.inf
    y = ops.rotary(x, cos, sin, backend=backend)
    assert y.isnan().nonzero().tolist() == [[1, 2, 3, 1], [1, 2, 3, 5]]
    assert y.isinf().nonzero().tolist() == [[0, 0, 0, 9]]


@pytest.mark.parametrize("backend", backend_params()[1:])
def test_results_do_not_depend_on_the_number_of_threads(backend):
    inputs = case((2, 9, 300, 64, 64), torch.float32)
    first, *others = for_each_number_of_threads(lambda: both(*inputs, backend=backend))
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 4)}, r"x has shape \(2, 3, 4\); it must be \(B, H, T, D\)"),
        ({"cos": torch.ones(3, 5, 4)}, r"cos has shape \(3, 5, 4\).*with B = 2, T = 5"),
        ({"cos": torch.ones(5, 4)}, r"cos has shape \(5, 4\)"),
        ({"sin": torch.ones(1, 5, 2)}, r"sin has shape \(1, 5, 2\).*R = 4"),
        ({"sin": torch.ones(1, 5, 4).double()}, "sin is float64; it must be float32"),
        ({"cos": torch.ones(1, 5, 4).bfloat16()}, "cos is bfloat16; it must be float32"),
        ({"x": torch.ones(2, 3, 5, 8, dtype=torch.int32)}, "tensors of int32"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"x": torch.ones(2, 3, 5, 8), "cos": torch.ones(1, 5, 4)}
    arguments["sin"] = arguments["cos"]
    with pytest.raises(ValueError, match=message):
        ops.rotary(**(arguments | change))


@pytest.mark.parametrize("turned", [3, 10])
def test_columns_that_cannot_be_turned(turned):
    angles = torch.ones(1, 5, turned)
    with pytest.raises(ValueError, match=f"cos has {turned} columns; .* at most the 8 of x"):
        ops.rotary(torch.ones(2, 3, 5, 8), angles, angles)


@pytest.mark.parametrize("backend", backend_params()[1:])
def test_the_extension_refuses_what_it_would_read_wrongly(backend):
    run = ops.implementation("rotary", "cpu", backend)
    x, cos, sin, _ = case((2, 3, 4, 8, 8), torch.float32)
    for arguments in (
        (x.mT, cos[:, :, :4], sin[:, :, :4]), (x, cos[:, :3], sin), (x, cos, sin[..., :6]),
        (x, cos.double(), sin.double()), (x, cos[..., :5], sin[..., :5]), (x[0], cos, sin),
        (x, cos, sin.bfloat16()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="rotary: "):
            run(*arguments, transposed=False)
