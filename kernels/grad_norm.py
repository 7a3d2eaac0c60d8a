"""Norm of all gradients of a call: a launch for each dtype, then one program that ends it.

Fused: conversion, square and float64 sum over all tensors in one pass; sum over chunks and root.
Bytes per element: 2 in bfloat16, 4 in float32, read once; 28 more for each chunk of 32768 (tables,
and its sum written and read). Bound: memory bandwidth, or, on a GPU with few float64 units, the two
float64 operations an element.
Chunks are summed in a fixed order, so that the result does not depend on how programs run.
Reference: grad_norm in ttt_fast/reference.py (same sum, another order).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import (
    SUMS_BLOCK,
    SUMS_WARPS,
    TRITON_DTYPES,
    chunk_pointer,
    read,
    square_root,
)
from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.pointer_table import PointerTable, pointer_tables, with_long_runs

# Elements of a program, and of a round of its loop: 16 a thread.
CHUNK = 32768
BLOCK = 4096
NUM_WARPS = 8


@triton.jit(do_not_specialize=["n_chunks"], do_not_specialize_on_alignment=["sums"])
def grad_norm_kernel(
    pointers, numels, n_chunks, sums, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the squares of one chunk; a full one without masks."""
    chunk = tl.program_id(0)
    numel = tl.load(numels + chunk)
    pointer = chunk_pointer(pointers, n_chunks, chunk, 0, GRAD, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    if numel == CHUNK:
        # Unrolled: all loads are on their way before the first is waited for.
        for first in tl.static_range(0, CHUNK, BLOCK):
            g = read(pointer + first + lanes, None, False).to(tl.float64)
            total += g * g
    else:
        for first in range(0, numel, BLOCK):
            g = read(pointer + first + lanes, first + lanes < numel, True).to(tl.float64)
            total += g * g
    tl.store(sums + chunk, tl.sum(total))


@triton.jit(do_not_specialize=["n_chunks"])
def finish_grad_norm_kernel(sums, n_chunks, norm, BLOCK: tl.constexpr):
    """Square root of the sum over all chunks; one program."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n_chunks, BLOCK):
        total += tl.load(sums + first + lanes, mask=first + lanes < n_chunks, other=0.0)
    tl.store(norm, square_root(tl.sum(total)).to(norm.dtype.element_ty))


def grad_norm_launch(grads: Sequence[Tensor]) -> Tensor:
    """See :func:`ttt_fast.ops.grad_norm`."""
    if not grads:
        return torch.zeros(())
    device = grads[0].device
    tables_of: dict[torch.device, list[PointerTable]] = {device: []}
    (grads,), _ = with_long_runs([grads], {})
    for table in pointer_tables([grads], CHUNK):
        tables_of.setdefault(table.numel.device, []).append(table)
    parts = [_square_sums(tables, at).to(device) for at, tables in tables_of.items()]
    sums = parts[0] if len(parts) == 1 else torch.cat(parts)
    double = any(grad.dtype == torch.float64 for grad in grads)
    norm = torch.empty((), dtype=torch.float64 if double else torch.float32, device=device)
    with torch.cuda.device_of(norm):
        finish_grad_norm_kernel[(1,)](
            sums, sums.numel(), norm, BLOCK=SUMS_BLOCK, num_warps=SUMS_WARPS, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return norm


def _square_sums(tables: Sequence[PointerTable], device: torch.device) -> Tensor:
    """Sum of the squares of each chunk on one device, float64."""
    sums = torch.empty(sum(t.n_chunks for t in tables), dtype=torch.float64, device=device)
    begin = 0
    with torch.cuda.device_of(sums):
        for table in tables:
            grad_norm_kernel[(table.n_chunks,)](
                table.pointers, table.numel, table.n_chunks, sums[begin:],
                GRAD=TRITON_DTYPES[table.dtypes[0]], ALIGNED=table.aligned, CHUNK=CHUNK,
                BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip
            begin += table.n_chunks
    return sums


def _case(dtype: torch.dtype) -> Case:
    return Case(
        str(dtype).removeprefix("torch."),
        grad_norm_kernel,
        {"pointers": "*i64", "numels": "*i32", "n_chunks": "i32", "sums": "*fp64"},
        {"GRAD": TRITON_DTYPES[dtype], "ALIGNED": True, "CHUNK": CHUNK, "BLOCK": BLOCK},
        NUM_WARPS,
        divisible=("pointers", "numels"),
        bytes_per_element=dtype.itemsize,
        block=CHUNK,
    )


CASES = [
    *(_case(dtype) for dtype in TRITON_DTYPES),
    Case(
        "end", finish_grad_norm_kernel, {"sums": "*fp64", "n_chunks": "i32", "norm": "*fp32"},
        {"BLOCK": SUMS_BLOCK}, SUMS_WARPS, divisible=("sums", "norm"),
    ),
]  # fmt: skip
