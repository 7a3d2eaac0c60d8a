import pytest
import torch

from tests.update_cases import as_row_slices, assert_same_bits, make_case, sgd_step
from ttt_fast import ops
from ttt_fast.kernels import undo_restore
from ttt_fast.kernels.undo_restore import undo_restore_launch
from ttt_fast.reference import UNDO_CHUNK

HALVES = [torch.bfloat16, torch.float16]
SHAPES = {
    "contiguous": [(7,), (131075,), (4097,), (1,), (0,), (70000,)],
    "strided": [(96, 48), (128, 96), (200, 48), (96, 96)],
}


def logged_case(kind, steps=3, lr=1e-3):
    """A case before and after some steps, and their log."""
    case = make_case(SHAPES[kind], HALVES)
    case = as_row_slices(case) if kind == "strided" else case
    before = case.clone()
    undo = ops.UndoLog(case.params)
    for step in range(steps):
        sgd_step(case, "torch", lr=lr, rounding="stochastic", seed=step, undo=undo)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(case.params, before.params, "params")
    return case, before, undo


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("lr", [1e-5, 1e-3, 1.0])
def test_restores_every_bit_and_keeps_the_log(kind, lr):
    case, before, undo = logged_case(kind, lr=lr)
    log = [t.clone() for t in undo.tensors]
    for _ in range(2):  # restoring again changes nothing
        ops.undo_restore_(case.params, undo, backend="triton")
        assert_same_bits(case.params, before.params, "params")
    for tensor, kept in zip(undo.tensors, log, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.parametrize("seed", range(3))
def test_the_oldest_entry_wins_whatever_the_order_and_the_window(monkeypatch, program_order, seed):
    case, before, undo = logged_case("contiguous", steps=6, lr=1e-4)
    indices = undo.tensors[0][: undo.entries]
    assert len(indices.unique()) < len(indices), "no element was logged twice"
    monkeypatch.setattr(undo_restore, "WINDOW_RUNS", 1 + seed)
    with program_order(seed):
        undo_restore_launch(case.params, undo.tensors, undo.offsets)
    assert_same_bits(case.params, before.params, "params")


def test_a_log_that_lost_its_first_step_is_noticed():
    case, before, undo = logged_case("contiguous", steps=1)
    first = undo.entries
    sgd_step(case, "torch", lr=0.5, undo=undo)
    undo.tensors[0][:first] = undo.tensors[0][first - 1]
    undo_restore_launch(case.params, undo.tensors, undo.offsets)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(case.params, before.params, "params")


def test_a_run_that_fills_up_step_by_step_is_restored_from_page_and_log():
    case = make_case([(65536,)], [torch.bfloat16])
    before = case.clone()
    undo = ops.UndoLog(case.params)
    for step in range(6):
        case.grads[0].zero_()
        case.grads[0][step * 5000 : step * 5000 + 9000] = 1.0
        sgd_step(case, "torch", lr=0.5, undo=undo)
    assert undo.paged_chunks == 1 and undo.entries == 2 * 9000
    undo_restore_launch(case.params, undo.tensors, undo.offsets)
    assert_same_bits(case.params, before.params, "params")


def test_other_parameters_are_left_alone(monkeypatch):
    monkeypatch.setattr(undo_restore, "WINDOW_RUNS", 2)
    case = make_case([(50,), (70000,), (600,), (66000,)], [torch.float32, *HALVES, HALVES[0]])
    before = case.clone()
    undo = ops.UndoLog(case.params)
    sgd_step(case, "torch", lr=1.0, undo=undo)
    stepped = case.clone()
    mine = undo.select([1, None, 3])
    undo_restore_launch([case.params[i] for i in (1, 2, 3)], undo.tensors, mine.offsets)
    expected = [stepped.params[0], before.params[1], stepped.params[2], before.params[3]]
    assert_same_bits(case.params, expected, "params")
    undo_restore_launch([], undo.tensors, [])
    undo_restore_launch(case.params[:1], undo.tensors, [-1])
    assert_same_bits(case.params, expected, "params")


@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("lr", [1e-4, 1.0], ids=["sparse", "whole runs"])
def test_touches_nothing_outside(fenced, at_start, lr):
    case = make_case([(UNDO_CHUNK + 4099,), (33,)], HALVES)
    before = case.clone()
    undo = ops.UndoLog(case.params)
    sgd_step(case, "torch", lr=lr, undo=undo)
    # Full to the last entry.
    log = [t[: undo.entries] for t in undo.tensors[:2]] + undo.tensors[2:]
    params = [fenced(p, at_start=at_start) for p in case.params]
    log = [fenced(t, at_start=at_start) for t in log]
    undo_restore_launch(params, log, undo.offsets)
    assert_same_bits(params, before.params, "params")


def test_elements_beyond_a_signed_index():
    # 2^31 elements are too many to keep: the last of 2^15 + 1 runs, of which none else is tracked.
    n_runs = 2**15 + 1
    offset = (n_runs - 1) * UNDO_CHUNK
    counts = torch.zeros(n_runs, dtype=torch.int32)
    counts[-1] = 2
    log = [
        torch.tensor([offset + 5 - 2**32, offset + 8 - 2**32]).int(),
        torch.tensor([11, 12], dtype=torch.int16),
        torch.tensor([2]), counts, torch.zeros(n_runs, dtype=torch.uint8),
        torch.empty(0, dtype=torch.int16),
    ]  # fmt: skip
    param = torch.zeros(9, dtype=torch.bfloat16)
    undo_restore_launch([param], log, [offset])
    assert param.view(torch.int16).tolist() == [0, 0, 0, 0, 0, 11, 0, 0, 12]
