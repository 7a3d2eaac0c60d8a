import pytest
import torch

from tests.interpreter.test_sgd import SIZES, SLICES
from tests.test_adamw import OPTIONS
from tests.update_cases import (
    DTYPES,
    Case,
    adamw_step,
    assert_same_bits,
    make_case,
    row_slices,
    steps_of_grads,
)
from ttt_fast import ops, reference
from ttt_fast.kernels.adamw import adamw_launch

# numpy says so; torch and a GPU do not.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero)")
options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_agree(expected: Case, steps: int = 2, **kwargs) -> None:
    """Compare with the reference, bit for bit, after each step."""
    actual = expected.clone()
    for step in range(steps):
        norm = ops.grad_norm(expected.grads, backend="torch")
        for case, backend in ((expected, "torch"), (actual, "triton")):
            adamw_step(
                case, backend, lr=0.05, step_index=step + 1, seed=step, grad_norm=norm,
                max_grad_norm=3.0, grad_scale=torch.tensor(4.0), **kwargs,
            )  # fmt: skip
        actual.assert_same(expected)


@options
@pytest.mark.parametrize("accumulate", [False, True], ids=["weight", "delta"])
def test_bit_for_bit(kwargs, accumulate):
    case = make_case(SIZES, DTYPES, n_states=2, accumulate=accumulate)
    assert_agree(case, rounding="nearest" if accumulate else "stochastic", **kwargs)


@pytest.mark.parametrize("wide", ["grads", "states"])
def test_bit_for_bit_with_wide_lists(wide):
    case = make_case(
        SIZES[:8], DTYPES, n_states=2, wide_grads=wide == "grads", wide_states=wide == "states"
    )
    assert_agree(case, rounding="nearest", **OPTIONS["decay"])


@dtypes
def test_bit_for_bit_on_strided_views(dtype):
    whole = make_case(SLICES, [dtype], n_states=2, accumulate=True)
    lists = [whole.params, whole.grads, *whole.states, whole.deltas, whole.bases]
    params, grads, first, second, deltas, bases = map(row_slices, lists)
    case = Case(params, grads, [first, second], deltas, bases)
    assert_agree(case, steps=1, rounding="stochastic", **OPTIONS["decay"])


def test_moments_of_different_dtypes():
    expected = make_case([(4097,), (5,)], [torch.bfloat16], n_states=2)
    expected.states[1] = [state.float() for state in expected.states[1]]
    assert_agree(expected)


@dtypes
@pytest.mark.parametrize("at_start", [False, True])
def test_nothing_beyond_the_tensors_is_touched(dtype, at_start, fenced):
    for size in (1, 4096, 4097):
        case = make_case([(size,)], [dtype], n_states=2, accumulate=True)
        for tensors in (case.params, case.grads, *case.states, case.deltas, case.bases):
            tensors[:] = [fenced(t, at_start=at_start) for t in tensors]
        adamw_step(case, "triton", lr=0.1, step_index=1)


def test_20_steps_and_the_way_back():
    params = make_case([(4097,)], [torch.bfloat16]).params
    grads = steps_of_grads(params)
    results, undo = [], ops.UndoLog(params)
    for launch in (reference.adamw_, adamw_launch):
        mine = [p.clone() for p in params]
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        landed = torch.zeros(2, dtype=torch.float64)
        for step, each in enumerate(grads):
            log = (undo.tensors, undo.offsets) if launch is adamw_launch else ((), ())
            launch(
                mine, each, *moments, (), (), None, None, None, landed, *log, lr=1e-3,
                step_index=step + 1,
            )  # fmt: skip
        results.append([*mine, *moments[0], *moments[1], landed])
    assert_same_bits(results[1][:-1], results[0][:-1], "tensors")
    torch.testing.assert_close(results[1][-1], results[0][-1], rtol=1e-12, atol=0)
    assert undo.paged_chunks == 1
    ops.undo_restore_(results[1][:1], undo, backend="torch")
    assert_same_bits(results[1][:1], params, "restored")


def test_special_values_agree():
    values = [0.0, -0.0, 1e-45, 6e-8, -3e-5, 65504.0, 3.3e38, -1e30, torch.inf, torch.nan]
    grid = torch.cartesian_prod(torch.tensor(values), torch.tensor(values))
    expected = Case([], [], [[], []])
    for dtype in DTYPES:
        expected.params.append(grid[:, 0].to(dtype))
        expected.grads.append(grid[:, 1].to(dtype))
        for state in expected.states:
            state.append(torch.zeros_like(expected.params[-1]))
    actual = expected.clone()
    for step in (1, 2):
        adamw_step(expected, "torch", measure=False, lr=1.0, step_index=step)
        adamw_step(actual, "triton", measure=False, lr=1.0, step_index=step)
        actual.assert_same(expected)


def test_empty_lists_and_found_inf_change_nothing():
    ops.adamw_([], [], [], [], lr=0.1, step_index=1, backend="triton")
    case = make_case([(4097,), (0,)], [torch.bfloat16], n_states=2)
    before = case.clone()
    adamw_step(case, "triton", lr=0.5, step_index=1, found_inf=torch.tensor(1.0))
    case.assert_same(before)
    adamw_step(case, "triton", lr=0.5, step_index=1, found_inf=torch.tensor(0.0))
    assert not torch.equal(case.params[0], before.params[0])
