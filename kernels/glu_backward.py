"""Gradients of a gated linear unit at its two inputs; a program takes one block.

Fused: conversion, the activation once more (nothing is kept from the forward but its inputs), its
derivative, both products and their rounding. Bytes per element: three reads and two writes, 10 in
16 bits and 20 in float32; stock torch moves twice as many and keeps act(gate). Bound: memory
bandwidth; an exponential and a division an element hide behind it.
Reference: glu_backward in ttt_fast/layer_reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import read, write
from ttt_fast.kernels.glu import BLOCK, NUM_WARPS, activated, cases


@triton.jit(do_not_specialize=["numel"])
def glu_backward_kernel(
    dy, gate, up, dgate, dup, numel, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """One block."""
    STORED: tl.constexpr = gate.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if STORED == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = first + tl.arange(0, BLOCK)
    mask = place < numel
    # The body stands in the code twice: masks would cost a full block its wide accesses.
    for MASKED in tl.static_range(2):
        if (numel - first < BLOCK) == (MASKED == 1):
            wide_dy = read(dy + place, mask, MASKED).to(WIDE)
            wide_up = read(up + place, mask, MASKED).to(WIDE)
            act, derivative = activated(read(gate + place, mask, MASKED).to(WIDE), ACTIVATION)
            write(dgate + place, (wide_dy * wide_up * derivative).to(STORED), mask, MASKED)
            write(dup + place, (wide_dy * act.to(STORED).to(WIDE)).to(STORED), mask, MASKED)


def glu_backward_launch(
    dy: Tensor, gate: Tensor, up: Tensor, *, activation: str
) -> tuple[Tensor, Tensor]:
    """See :func:`ttt_fast.ops.glu_backward`, which checks the arguments.

    Tensors that are not contiguous are copied.
    """
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    if gate.numel() > 0:
        glu_backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            dy, gate, up, dgate, dup, gate.numel(), ACTIVATION=activation, BLOCK=BLOCK,
            num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return dgate, dup


CASES = cases(glu_backward_kernel, ("dy", "gate", "up", "dgate", "dup"))
