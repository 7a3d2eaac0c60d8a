"""Snapshot and restore of all parameters of SmolLM2-135M: there and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.shapes import parameter_list
from ttt_fast import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_there_and_back(compare: Callable[..., None], dtype: torch.dtype) -> None:
    params = parameter_list("SmolLM2-135M", dtype)
    module = torch.nn.ParameterList([torch.nn.Parameter(p.clone()) for p in params])
    saved = [torch.empty_like(p) for p in params]
    moved = 4 * sum(p.nbytes for p in params)

    def clone_and_load() -> None:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(state)

    def foreach() -> None:
        torch._foreach_copy_(saved, params)
        torch._foreach_copy_(params, saved)

    def ours() -> None:
        ops.copy_(saved, params, backend="cpp")
        ops.copy_(params, saved, backend="cpp")

    sides = {
        "clone + load_state_dict": (clone_and_load, moved),
        "preallocated foreach_copy_": (foreach, moved),
        "ours": (ours, moved),
    }
    compare(f"snapshot + restore, SmolLM2-135M, {dtype}", sides, baseline="clone + load_state_dict")


def bench_checksum(compare: Callable[..., None]) -> None:
    params = parameter_list("SmolLM2-135M")
    moved = sum(p.nbytes for p in params)
    sides = {
        "reference": (lambda: ops.checksum(params, backend="torch"), moved),
        "ours": (lambda: ops.checksum(params, backend="cpp"), moved),
    }
    compare("checksum, SmolLM2-135M, float32", sides, baseline="reference", rounds=5)
