"""One op, every implementation, any input: the same bits, or sums within a few eps.

The sides are C++, the Triton kernels (interpreted) and the CUDA kernels (emulated); each is
compared with ``reference.py``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc import emulated
from tests.update_cases import Case, assert_same_bits, make_case
from ttt_fast import cuda_ops, ops, reference
from ttt_fast.rounding import compute_dtype
from ttt_fast.undo import UndoLog

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Relative error of a sum in the compute type, in any order, for the sizes that are drawn here.
EPS = {torch.float32: 2.0**-20, torch.float64: 2.0**-48}

Side = Callable[[str], Callable[..., Any]]


def in_cpp(op: str) -> Callable[..., Any]:
    return ops.implementation(op, "cpu", "cpp")


def in_triton(op: str) -> Callable[..., Any]:
    return ops.implementation(op, "cpu", "triton")


def in_cuda(op: str) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        # 2: one of the random orders of threads and blocks.
        with emulated.running(order=2):
            return getattr(cuda_ops, op)(*args, **options)

    return run


SIDES = {"cpp": in_cpp, "triton": in_triton, "cuda": in_cuda}


def sides(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("side", [pytest.param(SIDES[name], id=name) for name in names])


def drawn(examples: int) -> Callable[..., Any]:
    """As many examples, the same in each run; a kernel's first one is slow."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


shapes = st.lists(
    st.sampled_from([(), (0,), (1,), (7,), (3, 5), (64,), (130,), (33, 31)]), min_size=1, max_size=4
)
dtypes = st.lists(st.sampled_from(DTYPES), min_size=1, max_size=2)
seeds = st.integers(0, 2**63 - 2)


@st.composite
def updates(draw: st.DrawFn, n_states: int) -> tuple[Case, dict[str, Any]]:
    """A case and the options that all updates have."""
    kept = {name: draw(st.booleans()) for name in ("wide_grads", "wide_states", "accumulate")}
    seed = draw(st.integers(0, 99))
    case = make_case(draw(shapes), draw(dtypes), n_states=n_states, seed=seed, **kept)
    options = {
        "lr": draw(st.sampled_from([1e-3, 0.1])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01])),
        "maximize": draw(st.booleans()),
        "max_grad_norm": draw(st.sampled_from([-1.0, 0.5, 1e6])),
        "rounding": draw(st.sampled_from(["nearest", "stochastic"])),
        "seed": draw(seeds),
    }
    return case, options


@st.composite
def scalars(draw: st.DrawFn) -> list[Tensor | None]:
    """grad_norm, grad_scale, found_inf, of which all but the first may be missing."""
    scale, found = draw(st.sampled_from([None, 1024.0])), draw(st.sampled_from([None, 0.0, 1.0]))
    given = [3.7, scale, found]
    return [None if value is None else torch.tensor(value) for value in given]


def log_of(case: Case, undo: UndoLog) -> list[Tensor]:
    """What restoring from the log gives; the order of its entries is not fixed."""
    params = [param.clone() for param in case.params]
    reference.undo_restore_(params, undo.tensors, undo.offsets)
    return params


def check_update(op: str, side: Side, case: Case, given: list, options: dict[str, Any]) -> None:
    """Two updates by the side and by the reference: bits, undo log and update_landed."""
    results = []
    for function in (getattr(reference, op), side(op)):
        mine = case.clone()
        undo = UndoLog(mine.params)
        for seed in (options["seed"], options["seed"] + 1):
            function(
                mine.params, mine.grads, *mine.states, mine.deltas, mine.bases, *given,
                mine.landed, undo.tensors, undo.offsets, **options | {"seed": seed},
            )  # fmt: skip
        results.append((mine, log_of(mine, undo)))
    (expected, before), (actual, restored) = results
    actual.assert_same(expected)
    assert_same_bits(restored, before, "restored")


@sides("cpp", "triton", "cuda")
def test_sgd(side):
    @given(updates(n_states=1), scalars(), st.sampled_from([0.0, 0.9]), st.sampled_from([0.0, 0.1]),
           st.booleans(), st.booleans(), st.booleans())  # fmt: skip
    @drawn(40)
    def check(drawn_update, drawn_scalars, momentum, dampening, nesterov, decoupled, first):
        case, options = drawn_update
        options |= {"momentum": momentum, "dampening": dampening, "first_step": first}
        options |= {"nesterov": nesterov, "decoupled_weight_decay": decoupled}
        if momentum == 0.0:
            case.states = [[]]
        check_update("sgd_", side, case, drawn_scalars, options)

    check()


@sides("cpp", "triton", "cuda")
def test_adamw(side):
    @given(updates(n_states=2), scalars(), st.integers(1, 50))
    @drawn(40)
    def check(drawn_update, drawn_scalars, step_index):
        case, options = drawn_update
        options |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step_index": step_index}
        check_update("adamw_", side, case, drawn_scalars, options)

    check()


@sides("cpp", "triton", "cuda")
def test_copy(side):
    @given(shapes, dtypes, st.booleans())
    @drawn(15)
    def check(drawn_shapes, drawn_dtypes, transposed):
        sources = make_case(drawn_shapes, drawn_dtypes).params
        if transposed:
            sources = [source.t() if source.dim() == 2 else source for source in sources]
        for value in (torch.nan, -0.0):
            for source in sources:
                source.flatten()[:1].fill_(value)
        copies = [torch.full_like(source, 5.0) for source in sources]
        assert side("copy_")(copies, sources) is None
        assert_same_bits(copies, sources, "copies")

    check()


@sides("cpp", "triton", "cuda")
def test_undo_restore(side):
    @given(shapes, st.sampled_from([1e-4, 1e-3, 0.1]), st.integers(0, 99))
    @drawn(15)
    def check(drawn_shapes, lr, seed):
        case = make_case(drawn_shapes, [torch.bfloat16, torch.float16, torch.float32], seed=seed)
        undo = UndoLog(case.params)
        log = (None, None, None, None, undo.tensors, undo.offsets)
        # Few elements change at a small lr and are logged one by one; else the run is kept whole.
        for _ in range(3):
            reference.sgd_(case.params, case.grads, [], [], [], *log, lr=lr)
        restored = [param.clone() for param in case.params]
        side("undo_restore_")(restored, undo.tensors, undo.offsets)
        assert_same_bits(restored, log_of(case, undo), "restored")

    check()


@sides("cpp", "triton")
def test_checksum(side):
    @given(shapes, dtypes, st.integers(0, 99))
    @drawn(15)
    def check(drawn_shapes, drawn_dtypes, seed):
        tensors = make_case(drawn_shapes, drawn_dtypes, seed=seed).params
        assert int(side("checksum")(tensors)) == int(reference.checksum(tensors))

    check()


def near(actual: Tensor, expected: Tensor, size: Tensor | None = None) -> None:
    """Within eps of the magnitude of what was added up: `expected` where nothing cancels."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    size = expected if size is None else size
    assert ((actual - expected).abs() <= EPS[expected.dtype] * size.abs() + 1e-30).all()


@sides("cpp", "triton", "cuda")
def test_grad_norm(side):
    @given(shapes, dtypes)
    @drawn(15)
    def check(drawn_shapes, drawn_dtypes):
        grads = make_case(drawn_shapes, drawn_dtypes).grads
        near(side("grad_norm")(grads), reference.grad_norm(grads))

    check()


def near_rounded(actual: Tensor, oracle: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """Within one rounding to storage, and eps of what was added up, of the float64 result."""
    assert actual.dtype == dtype
    info = torch.finfo(dtype)
    bound = info.eps * (oracle.abs() + info.smallest_normal) + EPS[compute_dtype(dtype)] * size
    assert ((actual.double() - oracle).abs() <= bound).all()


def factors(dtype: torch.dtype, seed: int, *tensor_shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in tensor_shapes]


sizes = st.sampled_from([1, 3, 8, 17, 40])


@sides("cpp", "triton", "cuda")
def test_gram_norm(side):
    @given(st.sampled_from(DTYPES), seeds, st.integers(1, 3), sizes, sizes, sizes)
    @drawn(12)
    def check(dtype, seed, n_deltas, tokens, n_in, n_out):
        x, dy = factors(dtype, seed, (n_deltas, tokens, n_in), (n_deltas, tokens, n_out))
        # Terms of both signs: the bound is in the magnitudes of the products.
        size = reference.gram_norm(x.abs(), dy.abs())
        near(side("gram_norm")(x, dy), reference.gram_norm(x, dy), size)
        together = side("gram_norms")([x, dy], [dy, x])
        near(together, reference.gram_norms([x, dy], [dy, x]), size.expand(2, -1))

    check()


@sides("cpp", "triton")
def test_delta_linear(side):
    # C++ has no float16.
    has = DTYPES if side is not in_cpp else [dtype for dtype in DTYPES if dtype != torch.float16]

    @given(st.sampled_from(has), seeds, st.integers(1, 3), sizes, sizes, sizes, sizes)
    @drawn(12)
    def check(dtype, seed, n_deltas, tokens, n_in, n_out, rank):
        x, weight, a, d, beta, rho = factors(
            dtype, seed, (n_deltas, tokens, n_in), (n_out, n_in), (n_deltas, rank, n_in),
            (n_deltas, rank, n_out), (n_deltas, rank), (n_deltas,),
        )  # fmt: skip
        beta, rho = beta.to(compute_dtype(dtype)), rho.to(compute_dtype(dtype))
        given_tensors = (x, weight, a, d, beta, rho)
        magnitudes = [t.abs() for t in given_tensors]
        magnitudes[4] = -magnitudes[4]  # beta is subtracted
        size = reference.delta_linear(*(t.double() for t in magnitudes))
        expected = reference.delta_linear(*(t.double() for t in given_tensors))
        kept = torch.full_like(x, torch.nan)
        near_rounded(side("delta_linear")(*given_tensors, kept), expected, size, dtype)
        assert torch.equal(kept, x)

    check()


@sides("triton")
def test_rank_update(side):
    @given(st.sampled_from(DTYPES), seeds, sizes, sizes, sizes, st.sampled_from([1.0, 0.5]))
    @drawn(12)
    def check(dtype, seed, n_in, n_out, rank, scale):
        shapes_of = ((n_out, n_in), (rank, n_in), (rank, n_out), (rank,))
        weight, x, dy, beta = factors(dtype, seed, *shapes_of)
        beta = beta.to(compute_dtype(dtype))
        size, expected = weight.double().abs(), weight.double()
        reference.rank_update_(size, *(t.double().abs() for t in (x, dy, beta)), scale=scale)
        reference.rank_update_(expected, *(t.double() for t in (x, dy, beta)), scale=scale)
        side("rank_update_")(weight, x, dy, beta, scale=scale)
        near_rounded(weight, expected, size, dtype)

    check()


@sides("triton")
def test_rank_sgd(side):
    @given(st.sampled_from(DTYPES), seeds, sizes, sizes, sizes)
    @drawn(12)
    def check(dtype, seed, n_in, n_out, rank):
        shapes_of = ((n_out, n_in), (rank, n_in), (rank, n_out), (n_out, n_in))
        given_tensors = factors(dtype, seed, *shapes_of)

        def taken(op, tensors, lr):
            weight, x, dy, buffer = tensors
            op([weight], [x], [dy], [buffer], lr=lr, momentum=0.9)
            return weight, buffer

        size = taken(reference.rank_sgd_, [t.double().abs() for t in given_tensors], -0.1)
        expected = taken(reference.rank_sgd_, [t.double() for t in given_tensors], 0.1)
        actual = taken(side("rank_sgd_"), given_tensors, 0.1)
        for mine, right, magnitude in zip(actual, expected, size, strict=True):
            near_rounded(mine, right, magnitude, dtype)

    check()


@sides("cpp", "triton")
def test_nll(side):
    @given(st.sampled_from(DTYPES), seeds, sizes, st.sampled_from([1, 5, 64, 300]))
    @drawn(12)
    def check(dtype, seed, tokens, vocabulary):
        (logits,) = factors(dtype, seed, (tokens, vocabulary))
        targets = torch.arange(tokens) % vocabulary
        targets[::3] = -100
        expected, actual = logits.clone(), logits.clone()
        expected_losses = reference.nll_(expected, targets, ignore_index=-100)
        losses = side("nll_")(actual, targets, ignore_index=-100)
        near(losses, expected_losses, expected_losses + 1)
        # The gradient is rounded to the storage type: one unit in its last place.
        eps = torch.finfo(dtype).eps
        bound = (eps + EPS[compute_dtype(dtype)]) * expected.double().abs() + 1e-7 * eps
        assert ((actual.double() - expected.double()).abs() <= bound).all()

    check()


@sides("cpp", "triton")
def test_rms_norm(side):
    @given(st.sampled_from(DTYPES), seeds, st.integers(1, 3), sizes, sizes, st.booleans())
    @drawn(12)
    def check(dtype, seed, n_deltas, tokens, width, round_first):
        shape = (n_deltas, tokens, width)
        x, weight, dy = factors(dtype, seed, shape, (n_deltas, width), shape)
        weight = weight.to(compute_dtype(dtype))
        y, rstd = side("rms_norm")(x, weight, eps=1e-5, round_first=round_first)
        near(rstd, reference.rms_norm(x, weight, eps=1e-5, round_first=round_first)[1])
        options = {"round_first": round_first}
        dx, dweight = side("rms_norm_backward")(dy, x, weight, rstd, **options)

        x, weight, dy, factor = x.double(), weight.double()[:, None], dy.double(), rstd.double()
        expected = reference.rms_norm_backward(dy, x, weight[:, 0], factor, round_first=False)
        h, g = x * factor[..., None], (dy * weight).abs()
        near_rounded(y, h * weight, (1.0 + h.abs()) * weight.abs(), dtype)
        size = (g + h.abs() * (g * h.abs()).mean(-1, keepdim=True)) * factor[..., None]
        near_rounded(dx, expected[0], size, dtype)
        eps = EPS[dweight.dtype] + round_first * torch.finfo(dtype).eps
        bound = eps * (dy * h).abs().sum(1) + 1e-6 * round_first
        assert ((dweight.double() - expected[1]).abs() <= bound).all()

    check()


@sides("cpp", "triton")
def test_glu(side):
    @given(st.sampled_from(DTYPES), seeds, sizes, sizes, st.sampled_from(["silu", "gelu_tanh"]))
    @drawn(12)
    def check(dtype, seed, rows, columns, activation):
        gate, up, dy = factors(dtype, seed, *[(rows, columns)] * 3)
        gate, options = gate * 4, {"activation": activation}
        y = side("glu")(gate, up, **options)
        dgate, dup = side("glu_backward")(dy, gate, up, **options)
        gate, up, dy = gate.double(), up.double(), dy.double()
        expected = reference.glu_backward(dy, gate, up, **options)
        size = 1.0 + gate.abs()
        near_rounded(y, reference.glu(gate, up, **options), size * up.abs(), dtype)
        near_rounded(dgate, expected[0], size * (dy * up).abs(), dtype)
        near_rounded(dup, expected[1], size * dy.abs(), dtype)

    check()


@sides("cpp", "triton")
def test_rotary(side):
    @given(
        st.sampled_from(DTYPES), seeds, sizes, st.integers(1, 40), sizes, st.integers(0, 33),
        st.booleans(), st.booleans(),
    )  # fmt: skip
    @drawn(16)
    def check(dtype, seed, tokens, heads, half, rest, wide, transposed):
        x, angles = factors(dtype, seed, (2, tokens, heads, 2 * half + rest), (4, tokens, 2 * half))
        cos, sin = angles.to(compute_dtype(dtype) if wide else dtype).chunk(2)
        inputs, options = (x.transpose(1, 2), cos, sin), {"transposed": transposed}
        y = side("rotary")(*inputs, **options)
        assert_same_bits([y], [reference.rotary(*inputs, **options)], "y")

    check()


@sides("cpp", "triton", "cuda")
def test_a_difference_of_one_bit_is_seen(side):
    """The comparison itself: it fails for an update that is off by one bit in one value."""
    case = make_case([(7,)], [torch.bfloat16], n_states=1)

    def off_by_one(op):
        def run(params, *args, **options):
            side(op)(params, *args, **options)
            params[0].view(torch.int16)[3] += 1

        return run

    options = {"lr": 0.1, "momentum": 0.9, "rounding": "nearest", "seed": 0, "dampening": 0.0}
    options |= {"weight_decay": 0.0, "maximize": False, "max_grad_norm": -1.0, "nesterov": False}
    options |= {"first_step": False, "decoupled_weight_decay": False}
    check_update("sgd_", side, case, [None] * 3, options)
    with pytest.raises(AssertionError, match="1 elements differ, first at 3"):
        check_update("sgd_", off_by_one, case, [None] * 3, options)
