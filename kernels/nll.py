"""Loss of each token and the gradient of its logits, in place of the logits; one program a row.

Fused: conversion, maximum, exponentials, their sum, loss, softmax - onehot, rounding; stock torch
writes log softmax and its gradient beside the logits. A first sweep over the row keeps a maximum
and a sum of exponentials for each place in a block (online softmax, Milakov and Gimelshein 2018),
so that threads exchange nothing before its end; a second one writes the gradient.

Bytes per element: two reads and one write, 6 in bfloat16 and 12 in float32. A row of 128k logits is
256 KB in bfloat16: the second read mostly comes from the L2 cache, which leaves 4 and 8. A row that
is ignored is only written. Bound: memory bandwidth; three exponentials an element are close behind.
Reference: nll_ in ttt_fast/reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import divide, pointer_to
from ttt_fast.kernels.machine_code import Case
from ttt_fast.reference import NLL_SMALLEST
from ttt_fast.rounding import compute_dtype

BLOCK_BYTES = 8192
NUM_WARPS = 4


# ---------------------------------------------------------------------------- kernel


@triton.jit
def _exponentials(places, before, end, target, maxima, sums, row, MASKED: tl.constexpr):
    """Take a block into the maxima and the sums of exponentials, of all but the target.

    Where the target's is nearly all there is, nothing of the rest is lost beside it.
    """
    if MASKED:
        inside = (places >= before) & (places < end)
        z = tl.load(row + places, mask=inside, other=float("-inf")).to(sums.dtype)
    else:
        z = tl.load(row + places).to(sums.dtype)
    larger = tl.maximum(maxima, z)
    # Where there was nothing but -inf yet, the difference of two of them would be NaN.
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    e = tl.where(places == target, 0.0, tl.exp(z - shift))
    return larger, sums * tl.exp(maxima - shift) + e


@triton.jit
def _gradient(z, places, target, maximum, others, total, factor, SMALLEST: tl.constexpr):
    """What takes the place of the logits z of a block."""
    e = tl.where(places == target, -others, tl.exp(z.to(total.dtype) - maximum))
    # Before the product, which then makes no denormal number.
    return (tl.where(tl.abs(e) < SMALLEST * total, 0.0, e) * factor).to(z.dtype)


@triton.jit(do_not_specialize=["row_stride", "target_stride", "vocabulary", "ignore_index"])
def nll_kernel(
    logits,  # (M, V)
    targets,  # (M,)
    losses,  # (M,)
    row_stride,
    target_stride,
    vocabulary,
    ignore_index,
    BLOCK: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """One row."""
    WIDE: tl.constexpr = losses.dtype.element_ty
    BYTES: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth // 8
    program = tl.program_id(0).to(tl.int64)
    row = logits + program * row_stride
    # Places are counted from the last multiple of 16 bytes before the row, so that whole blocks are
    # accessed by 16 bytes even where the vocabulary is odd and rows begin anywhere.
    before = (row.to(tl.int64) % 16 // BYTES).to(tl.int32)
    end = before + vocabulary
    aligned = tl.multiple_of(row - before, 16)
    block = tl.arange(0, BLOCK)

    label = tl.load(targets + program * target_stride)
    if label == ignore_index:
        zeros = tl.zeros((BLOCK,), dtype=logits.dtype.element_ty)
        for start in range(0, end, BLOCK):
            places = start + block
            if start >= before and start + BLOCK <= end:
                tl.store(aligned + places, zeros)
            else:
                tl.store(aligned + places, zeros, mask=(places >= before) & (places < end))
        tl.store(losses + program, 0.0)
    else:
        # No place has the number of a label out of range; its row becomes NaN.
        known = (label >= 0) & (label < vocabulary)
        target = tl.where(known, label + before, -1).to(tl.int32)
        z_target = tl.load(row + label, mask=known, other=float("nan")).to(WIDE)

        maxima = tl.full((BLOCK,), float("-inf"), dtype=WIDE)
        sums = tl.zeros((BLOCK,), dtype=WIDE)
        for start in range(0, end, BLOCK):
            places = start + block
            if start >= before and start + BLOCK <= end:
                maxima, sums = _exponentials(
                    places, before, end, target, maxima, sums, aligned, False
                )
            else:
                maxima, sums = _exponentials(
                    places, before, end, target, maxima, sums, aligned, True
                )
        maximum = tl.max(maxima)
        others = tl.sum(sums * tl.exp(maxima - maximum))
        e_target = tl.exp(z_target - maximum)
        total = others + e_target
        factor = divide(tl.full((), 1.0, dtype=WIDE), total)

        for start in range(0, end, BLOCK):
            places = start + block
            if start >= before and start + BLOCK <= end:
                z = tl.load(aligned + places)
                dz = _gradient(z, places, target, maximum, others, total, factor, SMALLEST)
                tl.store(aligned + places, dz)
            else:
                inside = (places >= before) & (places < end)
                z = tl.load(aligned + places, mask=inside, other=0.0)
                dz = _gradient(z, places, target, maximum, others, total, factor, SMALLEST)
                tl.store(aligned + places, dz, mask=inside)

        # log1p by Kahan's correction, in float64: GPUs have no exact float32 logarithm near 1.
        rest = (others + (e_target - 1.0)).to(tl.float64)
        raised = 1.0 + rest
        log1p = tl.where(raised == 1.0, rest, tl.log(raised) * (rest / (raised - 1.0)))
        tl.store(losses + program, (maximum - z_target) + log1p.to(WIDE))


# ---------------------------------------------------------------------------- launch


def nll_launch(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """See :func:`ttt_fast.ops.nll_`, which checks the arguments.

    Logits of which the columns are strided are copied, and copied back.

    Raises:
        ValueError: the rows of ``logits`` share memory.
    """
    rows, vocabulary = logits.shape
    if rows > 1 and logits.stride(0) == 0:
        raise ValueError(
            "nll_: logits is expanded (its rows share memory) and cannot be written; pass a clone"
            " of it."
        )
    plain = logits if logits.stride(1) == 1 or vocabulary == 1 else logits.contiguous()
    losses = logits.new_empty(rows, dtype=compute_dtype(logits.dtype))
    if rows > 0:
        nll_kernel[(rows,)](
            plain, targets, losses, plain.stride(0), targets.stride(0), vocabulary, ignore_index,
            **_constants(logits.itemsize), num_warps=NUM_WARPS, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    if plain is not logits:
        logits.copy_(plain)
    return losses


def _constants(itemsize: int) -> dict[str, int | float]:
    return {"BLOCK": BLOCK_BYTES // itemsize, "SMALLEST": NLL_SMALLEST}


# ---------------------------------------------------------------------------- machine code


def _case(dtype: torch.dtype, *, aligned: bool = True) -> Case:
    return Case(
        str(dtype).removeprefix("torch.") + ", odd addresses" * (not aligned), nll_kernel,
        {
            "logits": pointer_to(dtype), "targets": "*i64",
            "losses": pointer_to(compute_dtype(dtype)), "row_stride": "i32",
            "target_stride": "i32", "vocabulary": "i32", "ignore_index": "i32",
        },
        _constants(dtype.itemsize), NUM_WARPS,
        divisible=("logits", "targets", "losses") if aligned else ("losses",),
        # Two reads and one write, and the zeros of an ignored row: of these a program does either.
        bytes_per_element=4 * dtype.itemsize, block=BLOCK_BYTES // dtype.itemsize,
    )  # fmt: skip


CASES = [
    *(_case(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
    _case(torch.bfloat16, aligned=False),
]
