"""Each case that the machine-code gate compiles is a launch that happens, argument by argument.

Kernels of products and norms of tokens have this test beside their own.
"""

import pytest
import torch

from tests.interpreter.compilations import Launches, kernel_of
from tests.update_cases import DTYPES, adamw_step, make_case, sgd_step
from ttt_fast import ops
from ttt_fast.kernels import (
    adamw,
    checksum,
    copy,
    grad_norm,
    gram_norm,
    gram_norms,
    machine_code,
    nll,
    sgd,
    undo_restore,
    update,
)
from ttt_fast.rounding import compute_dtype

SCALARS = {"grad_norm": torch.tensor(1.0), "max_grad_norm": 1.0, "found_inf": torch.tensor(0.0)}


def launch_updates(step, n_states, **options):
    """With and without all that an update may have, in every dtype."""
    for dtype in DTYPES:
        for accumulate, wide, measure, logged, rounding in (
            (False, False, False, False, "nearest"), (False, False, False, False, "stochastic"),
            (True, False, False, False, "nearest"), (True, False, True, False, "nearest"),
            (False, False, True, False, "nearest"), (False, False, True, True, "stochastic"),
            (False, True, True, True, "stochastic"),
        ):  # fmt: skip
            case = make_case(
                [(3,), (5,)], [dtype], n_states=n_states, accumulate=accumulate, wide_states=wide
            )
            step(
                case, "triton", measure, lr=0.1, undo=ops.UndoLog(case.params) if logged else None,
                rounding=rounding, **SCALARS, **options,
            )  # fmt: skip


def launch_sgd():
    launch_updates(sgd_step, 1, momentum=0.9, weight_decay=0.1)
    launch_updates(sgd_step, 1, momentum=0.9, weight_decay=0.1, first_step=True)
    launch_updates(sgd_step, 1)
    launch_updates(
        sgd_step, 1, momentum=0.9, nesterov=True, weight_decay=0.1, decoupled_weight_decay=True
    )


def launch_adamw():
    launch_updates(adamw_step, 2, step_index=1)


def launch_grad_norm():
    for dtype in DTYPES:
        ops.grad_norm([torch.ones(3, dtype=dtype), torch.ones(5, dtype=dtype)], backend="triton")


def launch_gram_norm():
    for dtype in DTYPES:
        for deltas in (1, 40, 200):
            x = torch.ones(deltas, 80, 8, dtype=dtype)
            ops.gram_norm(x, x, backend="triton")
            ops.gram_norms([x], [x], backend="triton")


def launch_nll():
    for dtype in DTYPES:
        logits, targets = torch.ones(4, 40, dtype=dtype), torch.ones(4).long()
        ops.nll_(logits, targets, backend="triton")
        ops.nll_(logits[:3, 1:], targets[1:], backend="triton")


def launch_copy():
    for dtype in (*DTYPES, torch.int8):
        copy.copy_launch([torch.ones(3, dtype=dtype)], [torch.ones(3, dtype=dtype)])
        if dtype.itemsize < 8 and dtype.is_floating_point:
            wide = torch.ones(3, dtype=compute_dtype(dtype))
            copy.copy_launch([torch.ones(3, dtype=dtype)], [wide])
            copy.copy_launch([wide], [torch.ones(3, dtype=dtype)])


def launch_checksum():
    for dtype in (*DTYPES, torch.int8):
        ops.checksum([torch.ones(3, dtype=dtype)], backend="triton")


def launch_undo_restore():
    param = torch.ones(3, dtype=torch.bfloat16)
    ops.undo_restore_([param], ops.UndoLog([param]), backend="triton")


@pytest.mark.parametrize(
    ("module", "launch"),
    [
        (sgd, launch_sgd), (adamw, launch_adamw), (update, launch_sgd),
        (grad_norm, launch_grad_norm), (gram_norm, launch_gram_norm),
        (gram_norms, launch_gram_norm), (nll, launch_nll),
        (copy, launch_copy), (checksum, launch_checksum), (undo_restore, launch_undo_restore),
    ],
    ids=lambda value: getattr(value, "__name__", "").rpartition(".")[2],
)  # fmt: skip
def test_the_machine_code_gate_compiles_what_is_launched(monkeypatch, module, launch):
    watched = {}
    for each in machine_code.kernel_modules():
        for name in {case.kernel.__name__ for case in each.CASES}:
            watched[name] = Launches(getattr(each, name))
            monkeypatch.setattr(each, name, watched[name])
    launch()
    launched = set().union(*(kernel.kernels for kernel in watched.values()))
    assert [c.name for c in module.CASES if kernel_of(c) not in launched] == []
    # And the comparison notices an option, or an argument that is or is not a multiple of 16.
    case = module.CASES[0]
    assert kernel_of(case._replace(num_stages=9)) not in launched
    assert kernel_of(case._replace(divisible=case.divisible[1:])) not in launched
