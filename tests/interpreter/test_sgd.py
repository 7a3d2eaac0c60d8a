import signal

import pytest
import torch

from tests.interpreter.compilations import Launches
from tests.interpreter.fences import signal_of
from tests.test_sgd import OPTIONS
from tests.update_cases import (
    DTYPES,
    Case,
    assert_same_bits,
    make_case,
    row_slices,
    sgd_step,
    steps_of_grads,
)
from ttt_fast import ops, reference
from ttt_fast.kernels import sgd, update
from ttt_fast.kernels.pointer_table import pointer_tables
from ttt_fast.kernels.sgd import sgd_launch
from ttt_fast.reference import UNDO_CHUNK

# A dtype after the other: with a full block and a tail, with little, with one and no element.
SIZES = [(4097,)] * 4 + [(7,)] * 4 + [(3, 5, 7), (0,), (), (1,)]
# Interleaved heads, columns of a Conv1D, a contiguous piece, and two with runs of one element.
SLICES = [(96, 48), (6, 96), (80, 60), (65, 67), (7, 192)]
# numpy says so; torch and a GPU do not.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_agree(expected: Case, steps: int = 2, **kwargs) -> Case:
    """Compare with the reference, bit for bit, after each step."""
    actual = expected.clone()
    for step in range(steps):
        norm = ops.grad_norm(expected.grads, backend="torch")
        for case, backend in ((expected, "torch"), (actual, "triton")):
            sgd_step(
                case, backend, lr=0.05, first_step=step == 0, seed=step - 1, grad_norm=norm,
                max_grad_norm=3.0, grad_scale=torch.tensor(4.0), **kwargs,
            )  # fmt: skip
        actual.assert_same(expected)
    return actual


@options
@pytest.mark.parametrize("accumulate", [False, True], ids=["weight", "delta"])
def test_bit_for_bit(kwargs, accumulate):
    case = make_case(SIZES, DTYPES, n_states=1, accumulate=accumulate)
    assert_agree(case, rounding="nearest" if accumulate else "stochastic", **kwargs)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["weight", "delta"])
def test_bit_for_bit_with_all_kinds_of_rounding(rounding, accumulate):
    case = make_case(SIZES[:8], DTYPES, n_states=1, accumulate=accumulate)
    assert_agree(case, rounding=rounding, **OPTIONS["dampening"])


@pytest.mark.parametrize("wide", ["grads", "states"])
def test_bit_for_bit_with_wide_lists(wide):
    case = make_case(
        SIZES[:8], DTYPES, n_states=1, wide_grads=wide == "grads", wide_states=wide == "states"
    )
    assert_agree(case, rounding="stochastic", **OPTIONS["nesterov"])


@dtypes
@pytest.mark.parametrize("accumulate", [False, True], ids=["weight", "delta"])
def test_bit_for_bit_on_strided_views(dtype, accumulate):
    whole = make_case(SLICES, [dtype], n_states=1, accumulate=accumulate)
    before = whole.clone()
    lists = [whole.params, whole.grads, *whole.states, whole.deltas, whole.bases]
    params, grads, state, deltas, bases = map(row_slices, lists)
    case = Case(params, grads, [state], deltas, bases)
    actual = assert_agree(case, rounding="stochastic", **OPTIONS["nesterov"])
    # What lies between the rows of a slice belongs to somebody else.
    outside = torch.ones(96, 48, dtype=torch.bool)
    outside.unflatten(0, (-1, 32)).narrow(1, 16, 16)[:] = False
    around = actual.params[0]._base.view(96, 48)
    assert torch.equal(around[outside], before.params[0][outside])


def test_views_at_odd_addresses(fenced):
    # Lists of other alignments than their neighbours, each ending at a protected page.
    case = make_case([(4103,), (4103,), (9,)], [torch.bfloat16], n_states=1)
    for tensors in (case.params, case.grads, case.states[0]):
        tensors[:] = [fenced(t)[k:] for k, t in enumerate(tensors)]
    assert [p.data_ptr() % 16 for p in case.params] != [0, 0, 0]
    expected = make_case([(4103,), (4103,), (9,)], [torch.bfloat16], n_states=1)
    for tensors in (expected.params, expected.grads, expected.states[0]):
        tensors[:] = [t[k:] for k, t in enumerate(tensors)]
    sgd_step(case, "triton", lr=0.1, momentum=0.9, rounding="stochastic")
    sgd_step(expected, "torch", lr=0.1, momentum=0.9, rounding="stochastic")
    case.assert_same(expected)


@dtypes
@pytest.mark.parametrize("at_start", [False, True])
def test_nothing_beyond_the_tensors_is_touched(dtype, at_start, fenced):
    for size in (1, 4096, 4097):
        case = make_case([(size,)], [dtype], n_states=1, accumulate=True)
        lists = [case.params, case.grads, case.states[0], case.deltas, case.bases]
        for tensors in lists:
            tensors[:] = [fenced(t, at_start=at_start) for t in tensors]
        undo = ops.UndoLog(case.params)
        sgd_step(case, "triton", lr=0.1, momentum=0.9, rounding="stochastic", undo=undo)


def test_a_chunk_that_is_taken_for_full_crashes(fenced, monkeypatch):
    params, grads = ([fenced(torch.zeros(4095))] for _ in range(2))
    tables = pointer_tables([params, grads, [], [], []], update.BLOCK)
    for more, ended in ((0, 0), (1, signal.SIGSEGV)):
        taken = [table._replace(numel=table.numel + more) for table in tables]
        monkeypatch.setattr(update, "pointer_tables", lambda *args, taken=taken: taken)
        assert signal_of(lambda: sgd_launch(params, grads, lr=0.1)) == ended


def test_20_steps(program_order):
    params = make_case([(4097,)], [torch.bfloat16]).params
    grads = steps_of_grads(params)
    results = []
    for launch, order in ((reference.sgd_, None), (sgd_launch, 0), (sgd_launch, 1)):
        mine, landed = [p.clone() for p in params], torch.zeros(2, dtype=torch.float64)
        buffers = [torch.full_like(p, torch.nan) for p in params]  # not read on the first step
        with program_order(order):
            for step, each in enumerate(grads):
                launch(
                    mine, each, buffers, landed=landed, lr=0.1, momentum=0.9, weight_decay=0.01,
                    first_step=step == 0, rounding="stochastic", seed=step,
                )  # fmt: skip
        results.append([*mine, *buffers, landed])
    assert_same_bits(results[1][:-1], results[0][:-1], "tensors")
    torch.testing.assert_close(results[1][-1], results[0][-1], rtol=1e-12, atol=0)
    assert_same_bits(results[2], results[1], "tensors in another order")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 0.3, 1e4])
def test_clip_and_scale_in_the_types_of_torch(double, scaled, max_grad_norm):
    kwargs = {}
    if max_grad_norm is not None:
        norm = torch.tensor(7.3, dtype=torch.float64 if double else torch.float32)
        kwargs = {"grad_norm": norm, "max_grad_norm": max_grad_norm}
    if scaled:
        kwargs["grad_scale"] = torch.tensor(3.7, dtype=torch.float32 if double else torch.float64)
    expected = make_case([(100,)] * 4, DTYPES)
    actual = expected.clone()
    sgd_step(expected, "torch", lr=0.1, **kwargs)
    sgd_step(actual, "triton", lr=0.1, **kwargs)
    actual.assert_same(expected)


def test_special_values_agree():
    values = [0.0, -0.0, 1e-45, 6e-8, -3e-5, 65504.0, 65519.0, 3.3e38, -1e30, torch.inf, torch.nan]
    grid = torch.cartesian_prod(torch.tensor(values), torch.tensor(values))
    expected = Case([], [], [[]])
    for dtype in DTYPES:
        expected.params.append(grid[:, 0].to(dtype))
        expected.grads.append(grid[:, 1].to(dtype))
        expected.states[0].append(torch.zeros_like(expected.params[-1]))
    actual = expected.clone()
    for seed, kwargs in enumerate([{"momentum": 0.9}, {"weight_decay": 0.1, "momentum": 0.9}]):
        for rounding in ("nearest", "stochastic"):
            for case, backend in ((expected, "torch"), (actual, "triton")):
                sgd_step(case, backend, measure=False, lr=1.0, rounding=rounding, seed=seed,
                         **kwargs)  # fmt: skip
            actual.assert_same(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_of_every_16_bit_value(dtype):
    params = [torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)]
    expected = Case(params, [torch.randn(2**16) * params[0].float().abs() * 1e-3], [])
    actual = expected.clone()
    sgd_step(expected, "torch", measure=False, lr=1.0, rounding="stochastic", seed=2**63 - 1)
    sgd_step(actual, "triton", measure=False, lr=1.0, rounding="stochastic", seed=2**63 - 1)
    actual.assert_same(expected)


@pytest.mark.parametrize("logged", [False, True])
def test_steps_share_one_kernel(monkeypatch, logged):
    kernel = Launches(sgd.sgd_kernel)
    monkeypatch.setattr(sgd, "sgd_kernel", kernel)
    monkeypatch.setattr(update, "undo_pages_kernel", pages := Launches(update.undo_pages_kernel))
    for size, seed in ((1, 0), (4096, 1), (4096 * 16, -1), (100000, 2**63 - 1)):
        case = make_case([(size,), (size,)], [torch.bfloat16], n_states=1)
        undo = ops.UndoLog(case.params) if logged else None
        norm = ops.grad_norm(case.grads, backend="torch")
        sgd_step(
            case, "triton", lr=1.0 / size, momentum=0.9, seed=seed, undo=undo, grad_norm=norm,
            max_grad_norm=1.0, rounding="stochastic",
        )  # fmt: skip
    assert kernel.count == 4 and len(kernel.kernels) == 1
    assert pages.count == 4 * logged and len(pages.kernels) == logged


def test_found_inf_changes_nothing():
    case = make_case([(4097,), (7,)], [torch.bfloat16], n_states=1, accumulate=True)
    case.grads[0][0] = torch.nan
    before, undo = case.clone(), ops.UndoLog(case.params)
    kwargs = {"grad_norm": torch.tensor(torch.nan), "max_grad_norm": 1.0, "undo": undo}
    sgd_step(case, "triton", lr=0.5, momentum=0.9, found_inf=torch.tensor(1.0), **kwargs)
    case.assert_same(before)
    assert undo.entries == undo.paged_chunks == 0
    sgd_step(case, "triton", lr=0.5, momentum=0.9, found_inf=torch.tensor(0.0), **kwargs)
    assert not torch.equal(case.params[1], before.params[1])


def test_lists_without_elements_change_nothing():
    landed = torch.ones(2, dtype=torch.float64)
    ops.sgd_([], [], lr=0.1, landed=landed, backend="triton")
    ops.sgd_([torch.zeros(0)], [torch.zeros(0)], lr=0.1, landed=landed, backend="triton")
    assert landed.tolist() == [1.0, 1.0]


def test_150_tiny_tensors():
    case = make_case([(1 + i % 7,) for i in range(150)], DTYPES, n_states=1)
    before = case.clone()
    sgd_step(case, "triton", measure=False, lr=0.5, momentum=0.9, first_step=True)
    for p, b, g in zip(case.params, before.params, before.grads, strict=True):
        assert torch.equal(p, (b.double() - 0.5 * g.double()).to(p.dtype))


@pytest.mark.parametrize("expanded", ["params", "momentum_buffers"])
def test_expanded_tensors_are_read_and_not_written(expanded):
    lists = {name: [torch.zeros(4)] for name in ("params", "momentum_buffers")}
    grads = [torch.ones(1).expand(4)]
    ops.sgd_(**lists, grads=grads, lr=0.5, momentum=0.9, first_step=True, backend="triton")
    assert lists["params"][0].tolist() == [-0.5] * 4
    lists[expanded] = [torch.zeros(1).expand(4)]
    with pytest.raises(ValueError, match=rf"{expanded}\[0\] is expanded"):
        ops.sgd_(**lists, grads=grads, lr=0.1, momentum=0.9, backend="triton")


# ---------------------------------------------------------------------------- undo log


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lrs", [[1e-5, 1e-5], [1e-5, 1.0, 1e-5]], ids=str)
def test_undo_brings_every_bit_back(dtype, lrs):
    # The first parameter has a full run and the start of another one.
    case = make_case([(UNDO_CHUNK + 5000,), (2,), (7,), (4097,)], [dtype, dtype, torch.float32])
    before, undo = case.clone(), ops.UndoLog(case.params)
    for seed, lr in enumerate(lrs):
        sgd_step(case, "triton", lr=lr, rounding="stochastic", seed=seed, undo=undo)
    assert undo.entries > 0
    assert bool(undo.tensors[4][0]) == (max(lrs) == 1.0)
    ops.undo_restore_(case.params, undo, backend="torch")
    tracked = [i for i, offset in enumerate(undo.offsets) if offset >= 0]
    assert len(tracked) == 3
    assert_same_bits(
        [case.params[i] for i in tracked], [before.params[i] for i in tracked], "restored"
    )


@pytest.mark.parametrize("order", range(4))
def test_undo_of_a_run_that_fills_up_in_the_middle_of_a_step(order, program_order):
    # Some programs log their chunk, those that come too late find no room: which ones, the order
    # decides. Of the second half only one weight in ten is small enough to change.
    param = torch.full((4, 4096), 1000.0, dtype=torch.bfloat16)
    param[:2] = 1.0
    param[2:, ::10] = 1.0
    param = param.flatten()[:-100]
    before, undo = param.clone(), ops.UndoLog([param])
    grads = [torch.full_like(param, -0.1)]
    with program_order(order):
        ops.sgd_([param], grads, lr=1.0, undo=undo, backend="triton")
        assert undo.paged_chunks == 1 and 0 < undo.entries <= len(param) // 3
        # Nothing is logged any more: what the page lacks is lost now.
        ops.sgd_([param], grads, lr=1e6, undo=undo, backend="triton")
    assert (param != before).all()
    ops.undo_restore_([param], undo, backend="torch")
    assert_same_bits([param], [before], "restored")


@pytest.mark.parametrize("changing", [3, 4])
def test_undo_keeps_a_run_whole_when_more_than_a_third_changed(changing):
    param = torch.full((10,), 1000.0, dtype=torch.bfloat16)
    param[:changing] = 1.0
    before, undo = param.clone(), ops.UndoLog([param])
    ops.sgd_([param], [torch.full_like(param, -0.1)], lr=1.0, undo=undo, backend="triton")
    assert (undo.entries, undo.paged_chunks) == ((3, 0) if changing == 3 else (0, 1))
    ops.undo_restore_([param], undo, backend="torch")
    assert_same_bits([param], [before], "restored")


def test_undo_of_a_step_that_is_nan():
    # Chunks of a row each, in one run: some are logged though all their elements change.
    param = torch.randn(24, 2000).bfloat16()[:, :1000]
    before, undo = param.clone(), ops.UndoLog([param])
    norm = torch.tensor(torch.nan)
    ops.sgd_([param], [torch.zeros_like(param)], lr=1.0, undo=undo, grad_norm=norm,
             max_grad_norm=1.0, backend="triton")  # fmt: skip
    assert param.isnan().all() and undo.entries > 0
    ops.undo_restore_([param], undo, backend="torch")
    assert_same_bits([param], [before], "restored")


def test_undo_logs_what_the_reference_logs():
    expected = make_case([(UNDO_CHUNK + 3,), (5000,)], [torch.bfloat16])
    actual = expected.clone()
    logs = {}
    for case, backend in ((expected, "torch"), (actual, "triton")):
        undo = logs[backend] = ops.UndoLog(case.params)
        for step in range(2):
            sgd_step(case, backend, lr=1e-4, seed=step, rounding="stochastic", undo=undo)
    actual.assert_same(expected)
    mine, theirs = logs["triton"], logs["torch"]
    assert mine.entries == theirs.entries > 0
    assert torch.equal(mine.tensors[3], theirs.tensors[3])

    def entries(undo):
        pairs = zip(undo.tensors[0].tolist(), undo.tensors[1].tolist(), strict=True)
        return sorted(list(pairs)[: undo.entries])

    assert entries(mine) == entries(theirs)


def test_undo_of_row_slices_and_of_a_selection():
    whole = make_case([(96, 48), (6, 96), (9, 9), (65, 67)], [torch.bfloat16])
    params = row_slices(whole.params[:2]) + [whole.params[2], whole.params[3].t()]
    grads = row_slices(whole.grads[:2]) + [whole.grads[2], whole.grads[3].t()]
    undo = ops.UndoLog(params).select([0, 1, None, 3])
    before = [p.clone() for p in params]
    for lr in (1e-3, 1.0):
        ops.sgd_(params, grads, lr=lr, undo=undo, backend="triton")
    assert undo.paged_chunks > 0
    ops.undo_restore_(params, undo, backend="torch")
    assert_same_bits([params[i] for i in (0, 1, 3)], [before[i] for i in (0, 1, 3)], "restored")
    assert not torch.equal(params[2], before[2])
