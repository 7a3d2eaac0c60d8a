"""The CUDA updates, run on the CPU, against the reference: bit for bit."""

import pytest
import torch

from tests.csrc import emulated
from tests.update_cases import (
    DTYPES,
    Case,
    assert_same_bits,
    make_case,
    odd_case,
    row_slices,
)
from ttt_fast import cuda_ops, reference
from ttt_fast.undo import UndoLog

SGD = {"lr": 0.05, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
SGD |= {"decoupled_weight_decay": False, "maximize": False, "max_grad_norm": 3.0}
ADAMW = {"lr": 0.05, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
ADAMW |= {"maximize": False, "max_grad_norm": 3.0}
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True, "maximize": True, "weight_decay": 0.1},
    "decoupled": {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
}
options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS.keys())


def update(module, case: Case, step: int, undo: UndoLog | None = None, **kwargs) -> None:
    """One step of SGD, or of AdamW where there are two states, by a module that has the op."""
    shared = (
        case.deltas, case.bases, kwargs.pop("grad_norm", None), kwargs.pop("grad_scale", None),
        kwargs.pop("found_inf", None), case.landed, undo.tensors if undo else [],
        undo.offsets if undo else [],
    )  # fmt: skip
    kwargs = {"rounding": "nearest", "seed": step} | kwargs
    if len(case.states) == 2:
        lists = (case.params, case.grads, *case.states)
        module.adamw_(*lists, *shared, step_index=step + 1, **(ADAMW | kwargs))
    else:
        lists = (case.params, case.grads, case.states[0])
        module.sgd_(*lists, *shared, first_step=step == 0, **(SGD | kwargs))


def assert_agrees(case: Case, steps: int = 2, order: int = 0, **kwargs) -> None:
    expected, actual = case, case.clone()
    for step in range(steps):
        update(reference, expected, step, **kwargs)
        with emulated.running(order=order):
            update(cuda_ops, actual, step, **kwargs)
        actual.assert_same(expected)


CLIP = {"grad_norm": torch.tensor(40.0), "grad_scale": torch.tensor(4.0)}


@options
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["weight", "delta"])
def test_sgd_agrees_bit_for_bit(kwargs, rounding, accumulate):
    assert_agrees(odd_case(1, "nothing", accumulate), rounding=rounding, **CLIP, **kwargs)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["weight", "delta"])
def test_adamw_agrees_bit_for_bit(rounding, accumulate):
    assert_agrees(odd_case(2, "nothing", accumulate), rounding=rounding, **CLIP)


@pytest.mark.parametrize("n_states", [1, 2], ids=["sgd", "adamw"])
@pytest.mark.parametrize("wide", ["grads", "states"])
def test_lists_wider_than_the_parameters(n_states, wide):
    kwargs = OPTIONS["momentum"] if n_states == 1 else {}
    assert_agrees(odd_case(n_states, wide, False), **kwargs)


@pytest.mark.parametrize("order", emulated.ORDERS)
def test_no_order_of_threads_changes_anything(order):
    case = make_case([(20000,), (7,)], [torch.bfloat16, torch.float32], n_states=1)
    assert_agrees(case, order=order, **OPTIONS["momentum"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_that_are_no_multiple_of_16(dtype):
    whole = make_case([(4099,)], [dtype], n_states=1, accumulate=True)

    def from_the_second(tensors):
        return [tensor[1:] for tensor in tensors]

    case = Case(
        from_the_second(whole.params), from_the_second(whole.grads),
        [from_the_second(state) for state in whole.states], from_the_second(whole.deltas),
        from_the_second(whole.bases),
    )  # fmt: skip
    first = whole.params[0][0].clone()
    assert_agrees(case, rounding="stochastic", **OPTIONS["momentum"])
    assert torch.equal(whole.params[0][0], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strided_views(dtype):
    whole = make_case([(96, 48), (128, 96), (80, 48), (12, 5)], [dtype], n_states=1)
    case = Case(
        row_slices(whole.params), row_slices(whole.grads), [row_slices(s) for s in whole.states]
    )
    untouched = whole.clone()
    assert_agrees(case, rounding="stochastic", **OPTIONS["momentum"])
    outside = torch.ones(96, 48, dtype=torch.bool)
    outside.unflatten(0, (-1, 32)).narrow(1, 16, 16)[:] = False
    assert torch.equal(whole.params[0][outside], untouched.params[0][outside])


def test_tensors_of_short_runs_are_not_cut_into_elements(monkeypatch):
    tables, chunks = cuda_ops.pointer_tables, []

    def counted(*args):
        found = tables(*args)
        chunks.extend(table.n_chunks for table in found)
        return found

    monkeypatch.setattr(cuda_ops, "pointer_tables", counted)
    case = make_case([(64, 40)], [torch.bfloat16], n_states=1)
    case.params, case.grads = [case.params[0].t()], [case.grads[0].t()]
    case.states = [[torch.zeros_like(case.params[0])]]
    before, undo = case.params[0].clone(), UndoLog(case.params)
    assert_agrees(case.clone(), steps=1, **OPTIONS["momentum"])
    with emulated.running():
        update(cuda_ops, case, 1, undo, momentum=0.9)
        assert not torch.equal(case.params[0], before)
        cuda_ops.undo_restore_(case.params, undo.tensors, undo.offsets)
        assert cuda_ops.grad_norm(case.grads) > 0
    assert_same_bits(case.params, [before], "restored")
    assert chunks == [1, 1, 1, 1]
    copy = torch.zeros(40, 64, dtype=torch.bfloat16)
    cuda_ops.copy_([copy], [before])
    assert torch.equal(copy, before) and len(chunks) == 4


@pytest.mark.parametrize("norm", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [torch.float32, torch.float64], ids=str)
def test_dtypes_of_the_scalars(norm, scale):
    case = make_case([(100,)], [torch.float32, torch.float64], n_states=1)
    scalars = {"grad_norm": torch.tensor(7.3, dtype=norm)}
    assert_agrees(case, grad_scale=torch.tensor(3.0, dtype=scale), **scalars)


@pytest.mark.parametrize("n_states", [1, 2], ids=["sgd", "adamw"])
@pytest.mark.parametrize("found", [0.0, 1.0, float("nan")])
def test_found_inf(n_states, found):
    case = make_case([(70,), (5000,)], [torch.bfloat16, torch.float32], n_states=n_states)
    assert_agrees(case, found_inf=torch.tensor(found))


def test_values_that_are_not_finite():
    case = make_case([(64,)], [torch.bfloat16, torch.float16, torch.float32], n_states=1)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 6e4, 1e-8])
    for i, tensors in enumerate((case.params, case.grads, case.states[0])):
        tensors[0][i * 6 : i * 6 + 6] = special.to(tensors[0].dtype)
    case.landed = None
    other = Case(
        [p.clone() for p in case.params], case.grads, [[s.clone() for s in case.states[0]]],
        landed=None,
    )  # fmt: skip
    update(reference, case, 1, rounding="stochastic", **OPTIONS["momentum"])
    with emulated.running():
        update(cuda_ops, other, 1, rounding="stochastic", **OPTIONS["momentum"])
    assert_same_bits(other.params, case.params, "params")
    assert_same_bits(other.states[0], case.states[0], "momentum_buffers")


def test_nothing_to_do():
    for case in (make_case([], [torch.float32], n_states=1), make_case([(0,)], [torch.float32])):
        with emulated.running():
            update(cuda_ops, Case(case.params, case.grads, [[]]), 0)


# ---------------------------------------------------------------------------- undo


def undo_case(dtype: torch.dtype, steps: int = 4) -> tuple[Case, list[list[torch.Tensor]]]:
    """Weights and gradients of some steps that change few of them, but for one dense piece."""
    case = make_case([(70000,), (50,), (3, 5, 7), (300,)], [dtype, torch.float32], n_states=1)
    case.params.append(torch.randn(96, 700).to(dtype).narrow(1, 50, 600))
    case.grads.append(torch.zeros(96, 600, dtype=dtype))
    case.states[0].append(torch.zeros(96, 600, dtype=dtype))
    generator = torch.Generator().manual_seed(1)
    grads = []
    for step in range(steps):
        grads.append([])
        for grad in case.grads:
            kept = torch.rand(grad.shape, generator=generator) < 0.02
            grads[-1].append(torch.where(kept, torch.randn(grad.shape), 0).to(grad.dtype))
        grads[-1][0][5000 : 5000 + 9000 * step] = 1.0
    return case, grads


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_undo_brings_every_bit_back(dtype, order):
    case, steps = undo_case(dtype)
    before = [param.clone() for param in case.params]
    undo = UndoLog(case.params)
    with emulated.running(order=order):
        for step, case.grads in enumerate(steps):
            update(cuda_ops, case, step, undo, lr=0.5)
    tracked = [i for i, offset in enumerate(undo.offsets) if offset >= 0]
    assert undo.entries > 0 and undo.paged_chunks == 1
    assert undo.entries <= len(undo.tensors[0])
    for module in (reference, cuda_ops):
        restored = [param.clone() for param in case.params]
        with emulated.running(order=order):
            module.undo_restore_(restored, undo.tensors, undo.offsets)
        for i, param in enumerate(restored):
            expected = before[i] if i in tracked else case.params[i]
            assert_same_bits([param], [expected], f"{module.__name__} {i}")


def test_what_the_reference_logged_is_restored():
    case, steps = undo_case(torch.bfloat16)
    before = [param.clone() for param in case.params]
    undo = UndoLog(case.params)
    for step, case.grads in enumerate(steps):
        update(reference, case, step, undo, lr=0.5)
    assert undo.paged_chunks == 1
    with emulated.running():
        cuda_ops.undo_restore_(case.params, undo.tensors, undo.offsets)
    assert_same_bits(case.params[::2], before[::2], "params")


def test_undo_restores_in_pieces(monkeypatch):
    monkeypatch.setattr(cuda_ops, "RESTORE_SLOTS", 30000)
    test_what_the_reference_logged_is_restored()


def test_a_log_does_not_change_the_update():
    case, steps = undo_case(torch.bfloat16, steps=2)
    logged = case.clone()
    undo = UndoLog(logged.params)
    with emulated.running():
        for step, grads in enumerate(steps):
            case.grads = logged.grads = grads
            update(cuda_ops, case, step, rounding="stochastic")
            update(cuda_ops, logged, step, undo, rounding="stochastic")
    logged.assert_same(case)
