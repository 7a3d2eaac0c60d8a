import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES
from ttt_fast import ops
from ttt_fast.rounding import compute_dtype

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def case(batch, tokens, rank, width, out, dtype, *, rho=True, spare=0, seed=0):
    """Arguments of the op; a and d are the first rows of buffers whose last `spare` are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    a, d = random(batch, rank + spare, width), random(batch, rank + spare, out, scale=0.1)
    a[:, rank:], d[:, rank:] = torch.nan, torch.nan
    x, weight = random(batch, tokens, width).to(dtype), random(out, width, scale=0.1).to(dtype)
    beta = random(batch, rank, scale=0.1).to(compute_dtype(dtype))
    factor = random(batch).exp().to(compute_dtype(dtype)) if rho else None
    return x, weight, a.to(dtype)[:, :rank], d.to(dtype)[:, :rank], beta, factor


def effective_weights(weight, a, d, beta, rho):
    """ρ W − Σ β d aᵀ of each delta, in float64."""
    weight, a, d, beta = (t.double() for t in (weight, a, d, beta))
    rho = torch.ones(len(a)).double() if rho is None else rho.double()
    return rho[:, None, None] * weight - (d * beta[..., None]).mT @ a


def oracle(x, weight, a, d, beta, rho):
    return x.double() @ effective_weights(weight, a, d, beta, rho).mT


def same_dtype(x, weight, a, d, beta, rho):
    """The formula, an operation after the other, as anyone would write it."""
    y = x @ weight.t()
    if rho is not None:
        y = (y * rho[:, None, None]).to(x.dtype)
    return y - ((x @ a.mT) * beta[:, None]).to(x.dtype) @ d


@dtypes
@pytest.mark.parametrize("rho", [False, True], ids=["no rho", "rho"])
@pytest.mark.parametrize(
    ("batch", "tokens", "rank", "width", "out"),
    [(1, 1, 1, 1, 1), (1, 7, 60, 33, 65), (3, 7, 60, 33, 65), (5, 1, 7, 129, 4), (3, 20, 0, 9, 8)],
)
def test_as_near_to_fp64_as_the_formula(dtype, rho, batch, tokens, rank, width, out):
    args = case(batch, tokens, rank, width, out, dtype, rho=rho, spare=3)
    actual = ops.delta_linear(*args)
    assert actual.is_contiguous()
    assert_no_worse(actual, same_dtype(*args), oracle(*args))


def test_with_the_delta_of_a_neighbour_the_comparison_fails():
    args = case(3, 7, 12, 33, 65, torch.float32)
    x, weight, a, d, beta, rho = args
    wrong = ops.delta_linear(x, weight, a, d.roll(1, 0), beta, rho)
    with pytest.raises(AssertionError, match="the oracle"):
        assert_no_worse(wrong, same_dtype(*args), oracle(*args))


@pytest.mark.parametrize("batch", [1, 3])
def test_swapped_factors_give_the_gradient_at_the_input(batch):
    x, weight, a, d, beta, rho = case(batch, 6, 10, 8, 5, torch.float64, spare=4)
    x.requires_grad_()
    y = x @ effective_weights(weight, a, d, beta, rho).mT
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(ops.delta_linear(dy, weight.t(), d, a, beta, rho), dx)


@dtypes
@pytest.mark.parametrize("batch", [1, 3])
def test_any_strides(dtype, batch):
    args = case(batch, 12, 10, 30, 20, dtype)
    x, weight, a, d, beta, rho = args
    expected = ops.delta_linear(*args)

    def strided(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    for other in (
        (x.mT.contiguous().mT, weight, a.mT.contiguous().mT, d.mT.contiguous().mT, beta, rho),
        (strided(x), strided(weight), strided(a), strided(d), strided(beta), strided(rho)),
        (x.transpose(0, 1).contiguous().transpose(0, 1), weight, a, d, beta.double(), rho.double()),
    ):
        torch.testing.assert_close(ops.delta_linear(*other), expected)


@dtypes
@pytest.mark.parametrize("batch", [1, 3])
def test_arguments_stay_as_they_are(dtype, batch):
    args = case(batch, 5, 10, 30, 20, dtype, spare=2)
    before = [t.clone() for t in args]
    ops.delta_linear(*args)
    assert all(torch.equal(t, b) for t, b in zip(args, before, strict=True))


@pytest.mark.parametrize(
    ("dtype", "batch"), [(torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 1)], ids=str
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_rows_of_larger_buffers_are_not_copied(dtype, batch, backward):
    x, weight, a, d, beta, rho = case(batch, 8, 40, 96, 64, dtype, spare=60)
    args = (x, weight, a, d, beta, rho)
    if backward:
        args = (x.new_ones(batch, 8, 64), weight.t(), d, a, beta, rho)

    def copies(function):
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            function()
        return [e.name for e in trace.events() if e.name in ("aten::clone", "aten::contiguous")]

    assert copies(lambda: ops.delta_linear(*args)) == []
    # The profiler shows one that is made inside another operation.
    assert copies(lambda: x.mT.reshape(-1)) != []


def test_tensors_that_require_gradients_give_one_that_does_not():
    args = [t.requires_grad_() for t in case(2, 5, 10, 30, 20, torch.float32)]
    assert not ops.delta_linear(*args).requires_grad
    with torch.no_grad():
        assert torch.equal(ops.delta_linear(*args), ops.delta_linear(*(t.detach() for t in args)))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (1, 3, 2, 4, 0)], ids=str)
def test_empty(shape):
    assert ops.delta_linear(*case(*shape, torch.float32)).shape == (shape[0], shape[1], shape[4])


@dtypes
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("shape", [(1, 1, 0, 1, 1), (3, 20, 0, 9, 8), (3, 7, 60, 33, 65)], ids=str)
def test_x_is_kept_behind_the_rows_of_a(dtype, backend, shape):
    x, weight, a, d, beta, rho = case(*shape, dtype)
    batch, tokens, rank, width, _ = shape
    buffer = torch.full((batch, rank + tokens + 2, width + 1), torch.nan).to(dtype)[..., 1:]
    buffer[:, :rank] = a
    append = buffer[:, rank : rank + tokens]
    version = append._version
    for given in ((weight, rho), (None, None)):
        append.fill_(torch.nan)
        args = x, given[0], buffer[:, :rank], d, beta, given[1]
        y = ops.delta_linear(*args, append, backend=backend)
        assert torch.equal(y, ops.delta_linear(*args, backend=backend))
        assert torch.equal(append, x) and append._version > version
        assert torch.equal(buffer[:, :rank], a) and buffer[:, rank + tokens :].isnan().all()


ARGS = case(2, 3, 4, 5, 6, torch.float32)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, ARGS[0][0], r"x has shape \(3, 5\); it must be \(B, M, in\)"),
        (1, ARGS[1].t(), r"weight has shape \(5, 6\); it must be \(out, in\) with in = 5"),
        (2, ARGS[2][:1], r"a has shape .* must be \(B, R, in\) with B = 2, in = 5"),
        (3, ARGS[3][:, :3], r"d has shape .* must be \(B, R, out\) with B = 2, R = 4, out = 6"),
        (4, ARGS[4][0], r"beta has shape \(4,\); it must be \(B, R\) with B = 2, R = 4"),
        (5, ARGS[5][:1], r"rho has shape \(1,\); it must be \(B\) with B = 2"),
        (2, ARGS[2].bfloat16(), "a is bfloat16; it must be float32"),
        (4, ARGS[4].bfloat16(), "beta is bfloat16; it must be float32 or float64"),
        (3, ARGS[3].to("meta"), "d is on meta, other tensors on cpu"),
        (
            6,
            torch.ones(2, 3, 6),
            r"append has shape .* \(B, M, in\) with B = 2, M = 3, in = 5",
        ),
        (6, torch.ones(2, 3, 5).half(), "append is float16; it must be float32"),
        (6, torch.ones(2, 5, 3).mT, r"append has strides .*; the entries of a row must lie side"),
    ],
)
def test_refusals(position, value, message):
    args = [*ARGS[:position], value, *ARGS[position + 1 :]]
    with pytest.raises(ValueError, match=message):
        ops.delta_linear(*args)


# ---------------------------------------------------------------------------- C++


# The types that C++ has. float16 goes to torch.
cpp_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str
)
# (rank, in, out): vectors of 16 to 64 bytes and what is left of them, blocks of 64 columns and of
# 64 rows of W, groups of 4 and 16 rows; one more and one less.
ODD = [
    (0, 33, 65), (1, 1, 1), (2, 3, 129), (5, 129, 3), (61, 67, 63), (64, 64, 64), (7, 257, 191),
    (3, 0, 4),
]  # fmt: skip


def without_weight(args):
    return args[0], None, *args[2:]


def in_columns(args):
    """The same weight, its columns contiguous, as a Conv1D and every backward have it."""
    x, weight, *rest = args
    return x, weight.t().contiguous().t(), *rest


def assert_rounds_as_sums_do(actual, args, what=""):
    """Within 4 √n ε Σ|terms| of the oracle, for sums of n terms each rounded in the dtype.

    The few elements of a small product may be nearer in torch by luck, which sums in another order.
    """
    x, weight, a, d, beta, rho = (None if t is None else t.double().abs() for t in args)
    terms = x @ weight.t() * (1 if rho is None else rho[:, None, None])
    terms += ((x @ a.mT) * beta[:, None]) @ d
    epsilon = torch.finfo(actual.dtype).eps / 2
    bound = 4 * (4 + x.shape[-1] + a.shape[1]) ** 0.5 * epsilon * terms
    excess = (actual.double() - oracle(*args)).abs() - bound
    assert bool((excess <= 0).all()), (what, float(excess.max()))


@cpp_dtypes
@pytest.mark.parametrize("kind", ["rows", "columns", "none"])
@pytest.mark.parametrize("rho", [False, True], ids=["no rho", "rho"])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_cpp_at_odd_sizes(dtype, kind, rho, batch, tokens):
    for rank, width, out in ODD:
        args = case(batch, tokens, rank, width, out, dtype, rho=rho, spare=3, seed=rank)
        x, weight, *rest = args
        zero = (x, torch.zeros_like(weight), *rest) if kind == "none" else args
        given = {"rows": args, "columns": in_columns(args), "none": without_weight(args)}[kind]
        actual = ops.delta_linear(*given, backend="cpp")
        assert actual.is_contiguous() and actual.dtype == dtype
        if dtype == torch.bfloat16:
            assert_no_worse(actual, same_dtype(*zero), oracle(*zero), f"{(rank, width, out)}")
        else:
            assert_rounds_as_sums_do(actual, zero, f"{(rank, width, out)}")


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("rho", [False, True], ids=["no rho", "rho"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 20), (3, 7), (2, 45)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpp_at_sizes_of_tiles(kind, rho, batch, tokens, dtype):
    """Where the processor has matrix tiles, their product; the delta is added before rounding."""
    for rank, width, out in ((0, 32, 96), (5, 160, 64), (61, 64, 224)):
        args = case(batch, tokens, rank, width, out, dtype, rho=rho, spare=3, seed=rank)
        given = {"rows": args, "columns": in_columns(args)}[kind]
        actual = ops.delta_linear(*given, backend="cpp")
        assert_no_worse(actual, same_dtype(*args), oracle(*args), f"{(rank, width, out)}")


def test_the_comparison_notices_a_rank_that_was_left_out():
    args = case(2, 7, 61, 67, 63, torch.float32)
    x, weight, a, d, beta, rho = args
    short = ops.delta_linear(x, weight, a[:, :-1], d[:, :-1], beta[:, :-1], rho, backend="cpp")
    with pytest.raises(AssertionError, match="the oracle"):
        assert_no_worse(short, same_dtype(*args), oracle(*args))
    with pytest.raises(AssertionError):
        assert_rounds_as_sums_do(short, args)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_without_a_weight_only_the_delta_is_computed(backend):
    x, weight, a, d, beta, rho = case(2, 5, 6, 7, 9, torch.float64)
    whole = ops.delta_linear(x, weight, a, d, beta, rho, backend=backend)
    delta = ops.delta_linear(x, None, a, d, beta, rho, backend=backend)
    base = rho[:, None, None] * (x @ weight.t())
    torch.testing.assert_close(whole, base + delta, rtol=1e-13, atol=1e-14)
    with pytest.raises(ValueError, match=r"d has shape .* must be \(B, R, out\)"):
        ops.delta_linear(x, None, a, d[:, :3], beta, rho, backend=backend)


def test_a_small_delta_outlives_the_rounding_to_bfloat16():
    """Rounded once: 1 + 2⁻⁸ + 2⁻⁸, each lost on its own, is the next number after 1."""
    x, weight = torch.ones(1, 1, 2).bfloat16(), torch.tensor([[1.0, 2.0**-8]]).bfloat16()
    a, d = torch.tensor([[[1.0, 0.0]]]).bfloat16(), torch.ones(1, 1, 1).bfloat16()
    beta = torch.full((1, 1), -(2.0**-8))
    for backend in ("torch", "cpp"):
        y = ops.delta_linear(x, weight, a, d, beta, backend=backend)
        assert y.item() == 1 + 2.0**-7
    assert (x @ weight.t()).item() == 1


@cpp_dtypes
@pytest.mark.parametrize("kind", ["rows", "columns", "none"])
@pytest.mark.parametrize(
    ("batch", "tokens", "rank", "width", "out"),
    [(1, 20, 200, 300, 500), (3, 7, 130, 257, 391), (3, 1, 5, 64, 129)],
)
def test_threads_change_no_bit(dtype, kind, batch, tokens, rank, width, out):
    args = case(batch, tokens, rank, width, out, dtype)
    given = {"rows": args, "columns": in_columns(args), "none": without_weight(args)}[kind]
    found = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [ops.delta_linear(*given, backend="cpp") for _ in range(2)]
    finally:
        torch.set_num_threads(found)
    assert all(torch.equal(result, results[0]) for result in results)


@cpp_dtypes
def test_views_of_larger_buffers(dtype):
    """Every stride that the C++ takes as it is: parts of buffers, and what lies beyond is NaN."""
    batch, tokens, rank, width, out = 3, 7, 10, 33, 21
    args = case(batch, tokens, rank, width, out, dtype)
    x, weight, a, d, beta, rho = args

    def inside(t):
        """The tensor in the middle of a larger one."""
        larger = torch.full([n + 5 for n in t.shape], torch.nan).to(t.dtype)
        view = larger[tuple(slice(2, 2 + n) for n in t.shape)]
        view.copy_(t)
        return view

    expected = ops.delta_linear(*args, backend="cpp")
    views = x, inside(weight), inside(a), inside(d), beta, rho
    assert torch.equal(ops.delta_linear(*views, backend="cpp"), expected)
    # Weights of the fused projections: some of the rows; and of its transpose, some columns.
    columns = x, inside(weight.t()).t(), inside(a), inside(d), beta, rho
    expected = ops.delta_linear(*in_columns(args), backend="cpp")
    assert torch.equal(ops.delta_linear(*columns, backend="cpp"), expected)
    # One delta's factors for all of a batch.
    a, d = a[:1].expand(batch, -1, -1), d[:1].expand(batch, -1, -1)
    shared = ops.delta_linear(x, weight, a, d, beta, rho, backend="cpp")
    copied = ops.delta_linear(x, weight, a.contiguous(), d.contiguous(), beta, rho, backend="cpp")
    assert torch.equal(shared, copied)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_dimensions_of_one_with_any_stride(backend, position):
    """Torch calls (1, 4, 1) with strides (4, 1, 4) contiguous, and leaves it as it is."""
    for rank, width, out in [(4, 1, 6), (4, 6, 1), (1, 6, 5), (4, 1, 1)]:
        args = list(case(1, 3, rank, width, out, torch.float64))
        expected = ops.delta_linear(*args, backend=backend)
        args[position] = args[position].repeat_interleave(3, -1).mT.contiguous().mT[..., ::3]
        torch.testing.assert_close(ops.delta_linear(*args, backend=backend), expected)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_nan_and_infinity_are_passed_on(backend):
    x, weight, a, d, beta, rho = case(2, 3, 4, 5, 6, torch.float32)
    x = x.clone()
    x[1, 2, 0] = torch.nan
    y = ops.delta_linear(x, weight, a, d, beta, rho, backend=backend)
    assert y.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[1, 2]]
    x[1, 2, 0] = torch.inf
    y = ops.delta_linear(x, weight, a, d, beta, rho, backend=backend)
    assert (~y.isfinite()).nonzero()[:, :2].unique(dim=0).tolist() == [[1, 2]]


def test_float16_is_not_in_cpp():
    args = case(1, 3, 4, 5, 6, torch.float16)
    with pytest.raises(ValueError, match="float16, which backend='cpp' does not have"):
        ops.delta_linear(*args, backend="cpp")
    assert torch.equal(ops.delta_linear(*args), ops.delta_linear(*args, backend="torch"))


BARE = torch.ops.ttt_fast_cpp.delta_linear


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, ARGS[0].half(), "must be float32, bfloat16 or float64"),
        (0, ARGS[0].mT.contiguous().mT, "must be contiguous"),
        (1, ARGS[1].double(), "must be of one dtype"),
        (1, torch.ones(12, 10)[::2, ::2], "must be contiguous"),
        (1, torch.ones(6, 4), "shapes do not agree"),
        (2, ARGS[2].mT.contiguous().mT, "must be contiguous"),
        (2, ARGS[2][:1], "shapes do not agree"),
        (3, ARGS[3][:, :2], "shapes do not agree"),
        (4, ARGS[4].double(), "beta and rho of the compute type"),
        (4, ARGS[4][:, :2].contiguous(), "shapes do not agree"),
        (5, ARGS[5][:1], "shapes do not agree"),
        (6, torch.ones(2, 3, 5).bfloat16(), "must be of one dtype"),
        (6, torch.ones(2, 5, 3).mT, "must be contiguous"),
        (6, torch.ones(2, 4, 5), "shapes do not agree"),
    ],
)
def test_cpp_checks_what_it_is_given(position, value, message):
    """Inner loops call it without the wrapper."""
    args = [*ARGS, None]
    args[position] = value
    with pytest.raises(RuntimeError, match=f"delta_linear: .*{message}"):
        BARE(*args)
