"""Gated linear unit of two projections, y = round(act(gate)) ∘ up; a program takes one block.

Fused: conversion, activation, its rounding, product, rounding; stock torch writes act(gate) and
reads it again. Bytes per element: two reads and one write, 6 in 16 bits and 12 in float32; stock
torch moves 10 and 20. Bound: memory bandwidth; an exponential and a division an element hide behind
it. Reference: glu in ttt_fast/layer_reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import divide, pointer_to, read, write
from ttt_fast.kernels.machine_code import Case

# Elements of a program, a straight line: 8 for each thread, in 16 bits one access of each tensor.
BLOCK = 1024
NUM_WARPS = 4


# ---------------------------------------------------------------------------- kernel


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """act(x) = x·s(u) and its derivative, with the logistic function s.

    u is x for SiLU; for GELU in its tanh form (1 + tanh z) / 2 = s(2z).
    """
    if ACTIVATION == "silu":
        u = x
    else:
        u = 1.5957691216057308 * (x + 0.044715 * (x * x * x))  # 2·sqrt(2/π)
    e = tl.exp(-tl.abs(u))
    larger = divide(tl.full((), 1.0, x.dtype), 1.0 + e)
    # 1 − s has few digits left where s is nearly 1, hence both of s(u) and s(−u).
    smaller = e * larger
    s = tl.where(u < 0.0, smaller, larger)
    derivative = x * (s * tl.where(u < 0.0, larger, smaller))
    if ACTIVATION == "gelu_tanh":
        derivative *= 1.5957691216057308 * (1.0 + 0.134145 * (x * x))
    return x * s, s + derivative


@triton.jit(do_not_specialize=["numel"])
def glu_kernel(gate, up, y, numel, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One block."""
    STORED: tl.constexpr = gate.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if STORED == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = first + tl.arange(0, BLOCK)
    mask = place < numel
    # The body stands in the code twice: masks would cost a full block its wide accesses.
    for MASKED in tl.static_range(2):
        if (numel - first < BLOCK) == (MASKED == 1):
            act, _ = activated(read(gate + place, mask, MASKED).to(WIDE), ACTIVATION)
            values = act.to(STORED).to(WIDE) * read(up + place, mask, MASKED).to(WIDE)
            write(y + place, values.to(STORED), mask, MASKED)


# ---------------------------------------------------------------------------- launch


def glu_launch(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """See :func:`ttt_fast.ops.glu`, which checks the arguments.

    Tensors that are not contiguous are copied.
    """
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if gate.numel() > 0:
        glu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, y, gate.numel(), ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS,
            num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y


# ---------------------------------------------------------------------------- machine code


def cases(kernel: Any, tensors: Sequence[str]) -> list[Case]:
    """Cases of either kernel, which reads or writes each of its tensors once."""
    return [
        Case(
            f"{str(dtype).removeprefix('torch.')}, {activation}", kernel,
            dict.fromkeys(tensors, pointer_to(dtype)) | {"numel": "i32"},
            {"ACTIVATION": activation, "BLOCK": BLOCK}, NUM_WARPS, divisible=tuple(tensors),
            bytes_per_element=len(tensors) * dtype.itemsize, block=BLOCK,
        )
        for dtype, activation in (
            (torch.bfloat16, "silu"), (torch.bfloat16, "gelu_tanh"), (torch.float16, "silu"),
            (torch.float32, "silu"), (torch.float64, "gelu_tanh"),
        )
    ]  # fmt: skip


CASES = cases(glu_kernel, ("gate", "up", "y"))
