"""Cases of the other tests, moved to the device, and the backends that they are run on."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.update_cases import Case, assert_same_bits
from ttt_fast import ops
from ttt_fast.backend import available_backends, backends_on

DEVICE_TYPE = "cpu" if os.environ.get("TTT_FAST_GPU_REHEARSAL") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backends_of(op: str) -> list[Any]:
    """The backends that an op has on the device; one that cannot be used is skipped, and why."""
    status = available_backends()
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(status[name] != "ok", reason=f"{name}: {status[name]}"),
        )
        for name in ops.SCHEMAS[op].backends
        if name in backends_on(DEVICE_TYPE)
    ]


def on(device: torch.device, tensor: Tensor) -> Tensor:
    """The memory around a tensor on a device, and the same view of it."""
    if tensor.numel() == 0:
        return tensor.to(device)
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device, copy=True).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


def case_on(device: torch.device, case: Case) -> Case:
    """A copy of a case on a device; views stay views."""

    def moved(tensors: list[Tensor]) -> list[Tensor]:
        return [on(device, tensor) for tensor in tensors]

    return Case(
        moved(case.params),
        moved(case.grads),
        [moved(state) for state in case.states],
        moved(case.deltas),
        moved(case.bases),
        case.landed.to(device),
    )


def assert_same_case(actual: Case, expected: Case) -> None:
    """Compare bit for bit, on the CPU; float64 sums of `landed` to a few ulp."""
    case_on(torch.device("cpu"), actual).assert_same(expected)


def assert_equal_runs(run: Any, times: int, what: str) -> None:
    """Repeat ``run() -> tensors``, which makes its own input; all must give the same bits."""
    first = [tensor.clone() for tensor in run()]
    for _ in range(times - 1):
        assert_same_bits(list(run()), first, what)
