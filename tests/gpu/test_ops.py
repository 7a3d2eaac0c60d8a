"""Every op in every backend that the device has, against the reference on the CPU."""

from functools import partial

import pytest
import torch

from tests import (
    test_delta_linear,
    test_glu,
    test_gram_norm,
    test_nll,
    test_rank_sgd,
    test_rank_update,
    test_rms_norm,
    test_rotary,
)
from tests.gpu.device_cases import (
    DTYPES,
    assert_same_case,
    backends_of,
    case_on,
    on,
)
from tests.test_copy import random_bytes, same_bytes
from tests.test_sgd import OPTIONS as SGD_OPTIONS
from tests.tolerances import assert_no_worse
from tests.update_cases import (
    ODD_SIZES,
    SLICE_SHAPES,
    adamw_step,
    as_row_slices,
    assert_same_bits,
    make_case,
    odd_case,
    row_slices,
    sgd_step,
)
from ttt_fast import ops, reference
from ttt_fast.rounding import compute_dtype
from ttt_fast.undo import UndoLog

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TESTED = {
    "sgd_", "adamw_", "grad_norm", "gram_norm", "gram_norms", "delta_linear", "rank_update_",
    "nll_", "copy_", "undo_restore_", "checksum", "rms_norm", "rms_norm_backward", "glu",
    "glu_backward", "rotary", "rank_sgd_",
}  # fmt: skip


def backends(op):
    return pytest.mark.parametrize("backend", backends_of(op))


def test_no_op_with_a_kernel_is_left_out():
    with_kernel = {n for n, s in ops.SCHEMAS.items() if {"triton", "cuda"} & set(s.backends)}
    assert with_kernel <= TESTED


# ---------------------------------------------------------------------------- updates, bit for bit


@backends("sgd_")
@pytest.mark.parametrize("kwargs", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@pytest.mark.parametrize("wide", ["nothing", "grads", "states"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["weight", "delta"])
def test_sgd(device, backend, kwargs, wide, accumulate):
    expected = odd_case(1 if kwargs else 0, wide, accumulate)
    actual = case_on(device, expected)
    clip = dict(lr=0.1, max_grad_norm=1.5, **kwargs)
    for step in range(3):
        for case, name in ((expected, "torch"), (actual, backend)):
            norm = torch.tensor(2.0 + step, device=case.params[0].device)
            sgd_step(case, name, grad_norm=norm, first_step=step == 0, **clip)
    assert_same_case(actual, expected)


@backends("sgd_")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_sgd_on_slices_of_fused_weights(device, backend, rounding):
    base = make_case(SLICE_SHAPES * 2, list(DTYPES), n_states=1)
    expected, actual = as_row_slices(base.clone()), as_row_slices(case_on(device, base))
    options = dict(lr=0.1, momentum=0.9, rounding=rounding, seed=77)
    sgd_step(expected, "torch", **options)
    sgd_step(actual, backend, **options)
    assert_same_case(actual, expected)


@backends("adamw_")
@pytest.mark.parametrize("wide", ["nothing", "grads", "states"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_adamw(device, backend, wide, rounding):
    expected = odd_case(2, wide, False)
    actual = case_on(device, expected)
    for step in range(1, 4):
        for case, name in ((expected, "torch"), (actual, backend)):
            norm = torch.tensor(2.0 + step, device=case.params[0].device)
            adamw_step(
                case, name, lr=0.01, step_index=step, grad_norm=norm, max_grad_norm=1.5,
                rounding=rounding, seed=step,
            )  # fmt: skip
    assert_same_case(actual, expected)


@backends("sgd_")
def test_an_update_reads_its_flags_on_the_device(device, backend):
    """Where found_inf is not 0 nothing changes; grad_scale divides."""
    for flag in (0.0, 1.0):
        expected = make_case([(4097,), (65537,)], [torch.float32, torch.bfloat16], n_states=1)
        actual = case_on(device, expected)
        for case, name in ((expected, "torch"), (actual, backend)):
            where = dict(device=case.params[0].device)
            sgd_step(
                case, name, lr=0.1, momentum=0.9, first_step=True,
                found_inf=torch.tensor(flag, **where), grad_scale=torch.tensor(8.0, **where),
            )  # fmt: skip
        assert_same_case(actual, expected)


@backends("sgd_")
def test_hundreds_of_tensors(device, backend):
    expected = make_case([(17 * i % 1031,) for i in range(400)], list(DTYPES), n_states=1)
    actual = case_on(device, expected)
    for case, name in ((expected, "torch"), (actual, backend)):
        sgd_step(case, name, lr=0.1, momentum=0.9)
    assert_same_case(actual, expected)


def test_a_wrong_bit_is_noticed(device):
    expected = make_case([(4097,)], [torch.bfloat16])
    actual = case_on(device, expected)
    actual.params[0][4096] *= 1.01
    with pytest.raises(AssertionError, match="first at 4096"):
        assert_same_case(actual, expected)


# ---------------------------------------------------------------------------- copies and undo


@backends("copy_")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int8, torch.int32], ids=str)
def test_copy(device, backend, dtype):
    srcs = [random_bytes(shape, dtype) for shape in ODD_SIZES if shape]
    srcs += row_slices([random_bytes((96, 96), dtype, seed=i) for i in range(5)])
    there = [on(device, src) for src in srcs]
    dsts = [torch.zeros_like(src) for src in there]
    ops.copy_(dsts, there, backend=backend)
    assert all(same_bytes(dst.cpu(), src) for dst, src in zip(dsts, srcs, strict=True))


@backends("undo_restore_")
def test_undo(device, backend):
    params = [
        (torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.5).to(dtype)
        for i, (shape, dtype) in enumerate(
            [((70001,), torch.bfloat16), ((33, 65), torch.float16), ((131075,), torch.bfloat16)]
        )
    ]
    live = [on(device, param) for param in params]
    log = UndoLog(live)
    for step in range(4):
        grads = [torch.randn_like(param) * 10.0 ** -(step + 1) for param in live]
        ops.sgd_(live, grads, lr=0.1, undo=log, backend=backend)
    assert not any(same_bytes(a.cpu(), b) for a, b in zip(live, params, strict=True))
    ops.undo_restore_(live, log, backend=backend)
    assert all(same_bytes(a.cpu(), b) for a, b in zip(live, params, strict=True))


@backends("checksum")
def test_checksum(device, backend):
    tensors = [random_bytes((n,), dtype) for n in (0, 1, 7, 4097, 70001) for dtype in DTYPES]
    expected = ops.checksum(tensors, backend="torch")
    there = [tensor.to(device) for tensor in tensors]
    assert ops.checksum(there, backend=backend) == expected
    there[-1].view(torch.int16)[70000] ^= 1
    assert ops.checksum(there, backend=backend) != expected


# ---------------------------------------------------------------------------- sums, near to fp64


@backends("grad_norm")
def test_grad_norm(device, backend):
    grads = odd_case(0, "nothing", False).grads
    oracle = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
    actual = ops.grad_norm([on(device, g) for g in grads], backend=backend).cpu()
    assert abs(actual.double() - oracle) <= 1e-6 * oracle


@backends("gram_norm")
@dtypes
@pytest.mark.parametrize("shape", test_gram_norm.SHAPES, ids=str)
def test_gram(device, backend, dtype, shape):
    x, dy = test_gram_norm.factors(*shape, dtype)
    actual = ops.gram_norm(x.to(device), dy.to(device), backend=backend).cpu()
    oracle = test_gram_norm.squared_norms(x, dy, torch.float64)
    assert_no_worse(actual, test_gram_norm.torch_grams(x, dy), oracle)


@backends("gram_norms")
@dtypes
def test_grams_of_the_steps_of_a_session(device, backend, dtype):
    buffers = test_gram_norm.buffers_of_layers(dtype)
    on_device = [[t.to(device) for t in each] for each in buffers]
    for start in (0, 21, 42):
        xs, dys = ([t[1:3, start : start + 21] for t in each] for each in buffers)
        rows = [[t[1:3, start : start + 21] for t in each] for each in on_device]
        actual = ops.gram_norms(*rows, backend=backend).cpu()
        for norms, x, dy in zip(actual, xs, dys, strict=True):
            oracle = test_gram_norm.squared_norms(x, dy, torch.float64)
            assert_no_worse(norms, test_gram_norm.torch_grams(x, dy), oracle)


# The C++ of a rehearsal has no float16.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(*backend.values, dtype, marks=backend.marks)
        for backend in backends_of("delta_linear")
        for dtype in DTYPES
        if backend.values != ("cpp",) or dtype != torch.float16
    ],
    ids=str,
)
@pytest.mark.parametrize("rho", [False, True], ids=["no rho", "rho"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (1, 7, 60, 33, 65), (3, 17, 700, 129, 264), (5, 20, 0, 9, 8)]
)
def test_delta(device, backend, dtype, rho, shape):
    """What lies behind the rows that count is NaN and must not be read into the result."""
    args = test_delta_linear.case(*shape, dtype, rho=rho, spare=3)
    there = [None if t is None else on(device, t) for t in args]
    actual = ops.delta_linear(*there, backend=backend).cpu()
    same, oracle = test_delta_linear.same_dtype(*args), test_delta_linear.oracle(*args)
    assert_no_worse(actual, same, oracle)


@backends("rank_update_")
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 65, 33), (60, 129, 4097), (0, 5, 6)], ids=str)
def test_rank_update_of_a_weight(device, backend, dtype, shape):
    args = test_rank_update.case(*shape, dtype)
    there = [on(device, t) for t in args]
    ops.rank_update_(*there, scale=0.9, backend=backend)
    oracle = test_rank_update.target(*args, 0.9, torch.float64)
    theirs = test_rank_update.target(*args, 0.9, compute_dtype(dtype)).to(dtype)
    assert_no_worse(there[0].cpu(), theirs, oracle)


@backends("rank_update_")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rank_update_rounds_with_the_same_bits(device, backend, dtype):
    """Sums that are exact in float32: nothing but the rounding is left to differ."""
    args = test_rank_update.integers(9, 65, 130, dtype)
    there = [on(device, t) for t in args]
    for weight, x, dy, beta, name in ((*args, "torch"), (*there, backend)):
        ops.rank_update_(weight, x, dy, beta, rounding="stochastic", seed=5, backend=name)
    assert torch.equal(there[0].cpu(), args[0])


@backends("rank_sgd_")
@dtypes
@test_rank_sgd.options
def test_rank_sgd_has_the_bits_of_the_reference(device, backend, dtype, options):
    """Sums that are exact in float32, and updates that are not fused multiply-adds."""
    params, xs, dys, buffers, _ = test_rank_sgd.case(dtype)
    expected = test_rank_sgd.taken(reference.rank_sgd_, params, (xs, dys), buffers, **options)
    there = ([on(device, t) for t in tensors] for tensors in (params, xs, dys, buffers))
    params, xs, dys, buffers = there
    step = partial(ops.rank_sgd_, backend=backend)
    taken = test_rank_sgd.taken(step, params, (xs, dys), buffers, device=device, **options)
    params, buffers, landed = ([t.cpu() for t in tensors] for tensors in (*taken[:2], [taken[2]]))
    test_rank_sgd.assert_same_step((params, buffers, landed[0]), expected)


@backends("nll_")
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (4, 65), (5, 4097), (3, 151936)], ids=str)
def test_nll_of_tokens(device, backend, dtype, shape):
    logits, targets = test_nll.case(*shape, dtype)
    oracle = test_nll.stock(logits, targets, torch.float64)
    theirs = test_nll.stock(logits, targets, compute_dtype(dtype))
    there = logits.to(device)
    losses = ops.nll_(there, targets.to(device), backend=backend)
    assert_no_worse(losses.cpu(), theirs[0], oracle[0], "losses")
    assert_no_worse(there.cpu(), theirs[1], oracle[1], "gradients")


def test_a_target_out_of_range_is_nan_on_a_device(device):
    logits, targets = torch.randn(3, 9), torch.tensor([1, 9, 2])
    losses = reference.nll_(logits.to(device), targets.to(device))
    assert losses.isnan().tolist() == [False, True, False]


# The forward is in every backend that the backward is in.
@backends("rms_norm_backward")
@dtypes
@pytest.mark.parametrize("round_first", [False, True], ids=["round last", "round first"])
@pytest.mark.parametrize(
    "shape",
    [*test_rms_norm.SHAPES, (2, 300, 4096), (2, 9, 16384), (2, 9, 8209)],
    ids=str,
)
def test_norm(device, backend, dtype, round_first, shape):
    inputs = test_rms_norm.case(shape, dtype)
    x, weight, dy = (on(device, t) for t in inputs)
    options = {"round_first": round_first, "backend": backend}
    y, rstd = ops.rms_norm(x, weight, eps=test_rms_norm.EPS, **options)
    gradients = ops.rms_norm_backward(dy, x, weight, rstd, **options)
    test_rms_norm.assert_right([t.cpu() for t in (y, *gradients)], *inputs, round_first)


@backends("rms_norm_backward")
def test_norm_of_one_column(device, backend):
    """A size that Triton makes a constant of; all is exact."""
    x, weight = torch.tensor([[[3.0], [-2.0]]]).to(device), torch.tensor([[0.5]]).to(device)
    y, rstd = ops.rms_norm(x, weight, eps=0.0, backend=backend)
    dx, dweight = ops.rms_norm_backward(x, x, weight, rstd, backend=backend)
    assert y.flatten().tolist() == [0.5, -0.5]
    assert dx.flatten().tolist() == [0.0, 0.0] and dweight.tolist() == [[5.0]]


@backends("glu_backward")
@dtypes
@pytest.mark.parametrize("activation", test_glu.ACTIVATIONS)
@pytest.mark.parametrize("shape", [*test_glu.SHAPES, (1024,), (300, 4097)], ids=str)
def test_gated(device, backend, dtype, activation, shape):
    inputs = test_glu.case(shape, dtype)
    gate, up, dy = (on(device, t) for t in inputs)
    options = {"activation": activation, "backend": backend}
    results = ops.glu(gate, up, **options), *ops.glu_backward(dy, gate, up, **options)
    test_glu.assert_right([t.cpu() for t in results], *inputs, activation)


@backends("rotary")
@dtypes
@pytest.mark.parametrize("wide", [False, True], ids=["angles as x", "wide angles"])
@pytest.mark.parametrize(
    "shape", [*test_rotary.SHAPES, (2, 40, 300, 128, 128), (1, 8, 4097, 64, 16)], ids=str
)
def test_turned(device, backend, dtype, wide, shape):
    inputs = test_rotary.case(shape, dtype, wide)
    results = test_rotary.both(*(on(device, t) for t in inputs), backend=backend)
    expected = test_rotary.both(*inputs, backend="torch")
    assert_same_bits([t.cpu() for t in results], list(expected), "rotary")
