import pytest
import torch
import torch.nn.functional as F

from tests.update_cases import DTYPES, backend_params, for_each_number_of_threads
from ttt_fast import ops
from ttt_fast.rounding import compute_dtype

backends = pytest.mark.parametrize("backend", backend_params())
# All but float16 in C++, which test_bad_arguments sees refused.
variants = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(*backend.values, dtype, marks=backend.marks)
        for backend in backend_params()
        for dtype in DTYPES
        if (*backend.values, dtype) != ("cpp", torch.float16)
    ],
)
# Rows of x; columns of it; rows of each W. Multiples of 32 are what tiles take; in float32 from 24
# rows on, up to 256 rows and 768 columns at a time.
SHAPES = [
    ((1,), 1, (1,)), ((3, 7), 33, (65, 1, 40)), ((2, 10), 96, (64, 32)), ((17,), 576, (192, 64)),
    ((70,), 160, (96, 33)), ((33,), 2100, (64,)), ((), 64, (32, 32)), ((48,), 64, (1024, 32)),
    ((24,), 32, (32,)), ((3, 15), 160, (96, 32)), ((300,), 1056, (32, 800)),
]  # fmt: skip


def case(shape, dtype, seed=0):
    """x, a dy for each weight, the weights."""
    rows, width, outs = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return random(*rows, width), [random(*rows, n) for n in outs], [random(n, width) for n in outs]


def run_all(shape, dtype, backend):
    """Results of both ops, the exact ones, and for these the sums of absolute terms."""
    x, dys, weights = case(shape, dtype)
    found = [*ops.linears(x, weights, backend=backend)]
    found.append(ops.linears_backward(dys, weights, backend=backend))
    wide = [w.double() for w in weights]

    def both(x, dys, weights):
        sums = sum(dy @ w for dy, w in zip(dys, weights, strict=True))
        return [*(F.linear(x, w) for w in weights), sums]

    exact = both(x.double(), [dy.double() for dy in dys], wide)
    terms = both(x.double().abs(), [dy.double().abs() for dy in dys], [w.abs() for w in wide])
    return found, exact, terms


@variants
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_float64_rounded_once(backend, dtype, shape):
    found, exact, terms = run_all(shape, dtype, backend)
    wide = compute_dtype(dtype)
    once = torch.finfo(dtype).eps / 2 if wide != dtype else 0
    length = max(shape[1], sum(shape[2]))
    for y, e, t in zip(found, exact, terms, strict=True):
        assert y.dtype == dtype and y.shape == e.shape
        bound = once * e.abs() + (length + 8) * torch.finfo(wide).eps * t
        assert bool(((y.double() - e).abs() <= bound).all())


@pytest.mark.parametrize("backend", backend_params()[1:])
@pytest.mark.parametrize("rows", [20, 64, 300])
def test_float32_is_as_near_to_float64_as_torchs(backend, rows):
    found, exact, _ = run_all(((rows,), 576, (1536, 192)), torch.float32, backend)
    theirs, *_ = run_all(((rows,), 576, (1536, 192)), torch.float32, "torch")
    for y, e, reference in zip(found, exact, theirs, strict=True):
        assert (y.double() - e).norm() <= 1.2 * (reference.double() - e).norm()


@backends
def test_a_sum_is_rounded_once(backend):
    """Two gradients that cancel leave what a sum of rounded ones has lost."""
    weight = torch.full((32, 32), 1.0, dtype=torch.bfloat16)
    dy = torch.zeros(4, 32, dtype=torch.bfloat16)
    dy[:, 0], dy[:, 1] = 256.0, 1.0  # 257 is no bfloat16
    other = torch.zeros_like(dy)
    other[:, 0] = -256.0
    dx = ops.linears_backward([dy, other], [weight, weight], backend=backend)
    assert torch.equal(dx, torch.ones_like(dx))


@variants
def test_weights_of_any_strides_and_parts_of_rows_give_the_same(backend, dtype):
    x, dys, weights = case(((2, 10), 96, (64, 32)), dtype)
    expected = [*ops.linears(x, weights, backend=backend)]
    expected.append(ops.linears_backward(dys, weights, backend=backend))
    fused = torch.cat([F.pad(w, (3, 5)) for w in weights])[:, 3:-5].split([64, 32])
    for views in (fused, [w.t().contiguous().t() for w in weights]):
        found = [*ops.linears(x.mT.contiguous().mT, views, backend=backend)]
        turned = [dy.mT.contiguous().mT for dy in dys]
        found.append(ops.linears_backward(turned, views, backend=backend))
        assert all(map(torch.equal, found, expected))


@variants
@pytest.mark.parametrize(
    "shape",
    [((0,), 64, (32, 32)), ((2, 0), 5, (3,)), ((4,), 0, (3, 2)), ((4,), 6, (0, 3))],
    ids=str,
)
def test_nothing_gives_nothing(backend, dtype, shape):
    for _ in range(3):
        used = torch.full((4, 6), torch.nan)  # memory that is not zero
        del used
        found, exact, _ = run_all(shape, dtype, backend)
        for y, e in zip(found, exact, strict=True):
            assert y.shape == e.shape and (shape[1] or not y.any())


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [12, 40])
def test_a_nan_stays_with_its_token(backend, dtype, rows):
    x, dys, weights = case(((rows,), 96, (64, 32)), dtype)
    clean = [*ops.linears(x, weights, backend=backend)]
    clean.append(ops.linears_backward(dys, weights, backend=backend))
    x[3, 5] = dys[0][3, 5] = torch.nan
    found = [*ops.linears(x, weights, backend=backend)]
    found.append(ops.linears_backward(dys, weights, backend=backend))
    others = torch.arange(rows) != 3
    for y, expected in zip(found, clean, strict=True):
        assert y[3].isnan().all() and torch.equal(y[others], expected[others])


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [12, 40])
def test_what_is_not_finite_in_a_weight_is_seen(backend, dtype, rows):
    x, dys, weights = case(((rows,), 96, (64, 32)), dtype)
    weights[1][7, 9] = torch.inf
    assert not ops.linears(x, weights, backend=backend)[1][:, 7].isfinite().any()
    dx = ops.linears_backward(dys, weights, backend=backend)
    # The column beside it may share that (csrc/cpu/tiles.h), no other one.
    assert not dx[:, 9].isfinite().any() and dx[:, :8].isfinite().all()
    assert dx[:, 10:].isfinite().all()


@backends
@pytest.mark.parametrize("scale", [2.0**-136, 2.0**-100, 2.0**100], ids=str)
def test_floats_of_any_size(backend, scale):
    """Parts of a float that are too small for one are lost: less than 2⁻¹²⁶ for each term."""
    x, dys, weights = case(((40,), 96, (64, 32)), torch.float32)
    x, dys = x * scale, [dy * scale for dy in dys]
    found = [*ops.linears(x, weights, backend=backend)]
    found.append(ops.linears_backward(dys, weights, backend=backend))
    wide = [w.double() for w in weights]
    exact = [x.double() @ w.t() for w in wide]
    exact.append(sum(dy.double() @ w for dy, w in zip(dys, wide, strict=True)))
    lost = 96 * 8 * 2.0**-126
    for y, e in zip(found, exact, strict=True):
        assert bool(((y.double() - e).abs() <= 3e-5 * scale + lost).all())


@pytest.mark.parametrize("backend", backend_params()[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("outs", [(192, 64, 64), (33, 40)], ids=str)
def test_results_depend_neither_on_threads_nor_on_other_rows(backend, dtype, outs):
    x, dys, weights = case(((37,), 576, outs), dtype)

    def run(rows=slice(None)):
        back = ops.linears_backward([dy[rows] for dy in dys], weights, backend=backend)
        return [*ops.linears(x[rows], weights, backend=backend), back]

    first, *others = for_each_number_of_threads(run)
    for other in others:
        assert all(map(torch.equal, first, other))
    # Tiles take floats from 24 rows on, and sum them in another order than vectors do.
    some = slice(5, 30) if dtype == torch.float32 else slice(5, 6)
    for whole, alone in zip(first, run(some), strict=True):
        assert torch.equal(whole[some], alone)


@pytest.mark.parametrize("backend", backend_params()[1:])
def test_few_floats_do_not_depend_on_other_rows(backend):
    x, dys, weights = case(((23,), 96, (64, 32)), torch.float32)
    for rows in (slice(None, 1), slice(7, 23)):
        alone = ops.linears(x[rows], weights, backend=backend)
        alone.append(ops.linears_backward([dy[rows] for dy in dys], weights, backend=backend))
        whole = ops.linears(x, weights, backend=backend)
        whole.append(ops.linears_backward(dys, weights, backend=backend))
        assert all(torch.equal(y[rows], part) for y, part in zip(whole, alone, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "got no weights"),
        ({"weights": [torch.ones(3, 8)]}, r"weights\[0\] has shape \(3, 8\).*in = 7"),
        ({"weights": [torch.ones(3, 7), torch.ones(7)]}, r"weights\[1\] has shape \(7,\)"),
        ({"weights": [torch.ones(3, 7).double()]}, r"weights\[0\] is float64; it must be float32"),
        ({"x": torch.ones(5, 7, dtype=torch.int32)}, "int32 are not supported"),
        ({"x": torch.ones(5, 7).half(), "weights": [torch.ones(3, 7).half()], "backend": "cpp"},
         "float16, which backend"),
    ],
)  # fmt: skip
def test_bad_arguments(change, message):
    arguments = {"x": torch.ones(5, 7), "weights": [torch.ones(3, 7)]}
    with pytest.raises(ValueError, match=f"linears: .*{message}"):
        ops.linears(**(arguments | change))


@pytest.mark.parametrize(
    ("dys", "weights", "message"),
    [
        ([torch.ones(5, 3)], [torch.ones(3, 7), torch.ones(3, 7)], "got 1 dys but 2 weights"),
        ([], [], "got no weights"),
        ([torch.ones(5, 3)], [torch.ones(4, 7)], r"weights\[0\] has shape \(4, 7\).*out = 3"),
        ([torch.ones(5, 3), torch.ones(6, 3)], [torch.ones(3, 7)] * 2, r"dys\[1\] has shape"),
        ([torch.ones(5, 3)] * 2, [torch.ones(3, 7), torch.ones(3, 6)], r"weights\[1\].*in = 7"),
    ],
)  # fmt: skip
def test_bad_gradients(dys, weights, message):
    with pytest.raises(ValueError, match=f"linears_backward: .*{message}"):
        ops.linears_backward(dys, weights)


@pytest.mark.parametrize("backend", backend_params()[1:])
def test_the_extension_refuses_what_it_would_read_wrongly(backend):
    forward = ops.implementation("linears", "cpu", backend)
    back = ops.implementation("linears_backward", "cpu", backend)
    x, (dy, other), (weight, second) = case(((5,), 7, (3, 4)), torch.float32)
    for arguments in (
        (x.t().contiguous().t(), [weight]), (x, [weight[:, :6]]), (x, [weight.double()]),
        (x, [weight[0]]), (x, [weight.t().contiguous().t()]), (x.half(), [weight.half()]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="linears: "):
            forward(*arguments)
    for arguments in (
        ([dy], [weight, second]), ([], []), ([dy.t().contiguous().t()], [weight]),
        ([dy, other[:4]], [weight, second]), ([dy, other.double()], [weight, second]),
        ([dy[:, :2]], [weight]), ([dy, other], [weight, second[:, :6]]), ([dy], [weight[0]]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="linears_backward: "):
            back(*arguments)
