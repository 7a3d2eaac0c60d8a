"""The same input gives the same bits, however often it is run and whatever else the GPU does.

A missing barrier or a sum whose order is left to chance shows now and then, so each op is repeated.
"""

from functools import partial

import pytest
import torch

from tests import test_delta_linear, test_gram_norm, test_nll, test_rank_sgd, test_rank_update
from tests.gpu.device_cases import DEVICE_TYPE, assert_equal_runs, backends_of, case_on, on
from tests.update_cases import make_case, sgd_step
from ttt_fast import ops
from ttt_fast.undo import UndoLog

pytestmark = pytest.mark.gpu
TIMES = 5 if DEVICE_TYPE == "cpu" else 200
SHAPES = [(4097,), (65537,), (1,), (300, 1031)] * 8


def backends(op):
    return pytest.mark.parametrize("backend", backends_of(op))


@backends("sgd_")
def test_updates(device, backend):
    case = case_on(device, make_case(SHAPES, [torch.float32, torch.bfloat16], n_states=1))

    def run():
        mine = case.clone()
        norm = ops.grad_norm(mine.grads, backend=backend)
        sgd_step(
            mine, backend, lr=0.1, momentum=0.9, grad_norm=norm, max_grad_norm=1.0,
            rounding="stochastic", seed=3,
        )  # fmt: skip
        return [*mine.params, *mine.states[0], mine.landed, norm]

    assert_equal_runs(run, TIMES, "sgd_")


@backends("undo_restore_")
def test_the_undo_log(device, backend):
    params = [param.to(device) for param in make_case(SHAPES, [torch.bfloat16]).params]
    grads = [torch.ones_like(param) * 1e-2 for param in params]

    def run():
        mine = [param.clone() for param in params]
        log = UndoLog(mine)
        ops.sgd_(mine, grads, lr=0.1, undo=log, backend=backend)
        ops.undo_restore_(mine, log, backend=backend)
        return mine

    assert_equal_runs(run, TIMES, "undo")
    assert all(torch.equal(mine, param) for mine, param in zip(run(), params, strict=True))


@backends("gram_norm")
def test_gram(device, backend):
    x, dy = (t.to(device) for t in test_gram_norm.factors(3, 70, 577, 1030, torch.bfloat16))
    assert_equal_runs(lambda: [ops.gram_norm(x, dy, backend=backend)], TIMES, "gram_norm")


@backends("delta_linear")
def test_delta(device, backend):
    args = [on(device, t) for t in test_delta_linear.case(3, 33, 300, 264, 520, torch.bfloat16)]
    assert_equal_runs(lambda: [ops.delta_linear(*args, backend=backend)], TIMES, "delta_linear")


@backends("rank_update_")
def test_rank_updates(device, backend):
    weight, *rest = (on(device, t) for t in test_rank_update.case(60, 257, 1031, torch.bfloat16))

    def run():
        mine = weight.clone()
        ops.rank_update_(mine, *rest, backend=backend)
        return [mine]

    assert_equal_runs(run, TIMES, "rank_update_")


@backends("rank_sgd_")
def test_steps_with_products(device, backend):
    params, xs, dys, buffers, _ = test_rank_sgd.case(torch.bfloat16, [(60, 257, 1031)] * 3)
    params, xs, dys, buffers = ([t.to(device) for t in each] for each in (params, xs, dys, buffers))
    step = partial(ops.rank_sgd_, backend=backend)

    def run():
        taken = test_rank_sgd.taken(
            step, params, (xs, dys), buffers, device=device, momentum=0.9, rounding="stochastic"
        )
        return [*taken[0], *taken[1], taken[2]]

    assert_equal_runs(run, TIMES, "rank_sgd_")


@backends("nll_")
def test_losses(device, backend):
    logits, targets = (t.to(device) for t in test_nll.case(33, 5003, torch.bfloat16))

    def run():
        mine = logits.clone()
        return [ops.nll_(mine, targets, backend=backend), mine]

    assert_equal_runs(run, TIMES, "nll_")


def test_a_run_that_differs_is_noticed(device):
    runs = iter([0.0, 0.0, 1.0])
    with pytest.raises(AssertionError, match="elements differ"):
        assert_equal_runs(lambda: [torch.full((3,), next(runs), device=device)], 3, "chance")
