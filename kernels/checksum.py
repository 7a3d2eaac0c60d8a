"""Checksum of the bits of a list of tensors, one launch for each element size.

Fused: mixing and sum over all tensors. Sums are modulo 2⁶⁴, so that their order changes nothing and
programs may add to one number.
Bytes per element: the element, read once; 24 bytes of tables for a chunk of 32768. Bound: memory
bandwidth for 4 bytes and more, else the three 64-bit products of an element.
Reference: checksum in ttt_fast/reference.py, the same number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import chunk_pointer, read
from ttt_fast.kernels.copy import INTEGERS, TRITON_INTEGERS, as_integers
from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.pointer_table import pointer_tables, with_long_runs

# Elements of a program, and of a round of its loop: 16 a thread.
CHUNK = 32768
BLOCK = 4096
NUM_WARPS = 8

_PHI: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_FACTOR: tl.constexpr = tl.constexpr(0xD6E8FEB86659FD93)


@triton.jit
def _mixed(x, index):
    """mix(x + (index + 1)·φ) of the reference."""
    z = x.to(tl.int64).to(tl.uint64, bitcast=True) + (index + 1).to(tl.uint64) * _PHI
    y = z * _FACTOR
    return (y ^ (y >> 32)) * _FACTOR


@triton.jit(do_not_specialize=["n_chunks"])
def checksum_kernel(
    pointers, numels, index, tensors, n_chunks, total, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the share of one chunk to ``total``; its full blocks without masks."""
    chunk = tl.program_id(0)
    numel = tl.load(numels + chunk)
    begin = tl.load(index + chunk)
    pointer = chunk_pointer(pointers, n_chunks, chunk, 0, DTYPE, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.uint64)
    whole = numel // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        i = first + lanes
        sums += _mixed(read(pointer + i, None, False), begin + i)
    if whole < numel:
        i = whole + lanes
        mixed = _mixed(read(pointer + i, i < numel, True), begin + i)
        sums += tl.where(i < numel, mixed, 0)
    share = tl.sum(sums).to(tl.int64, bitcast=True)
    share *= 2 * tl.load(tensors + chunk).to(tl.int64) + 1
    tl.atomic_add(total, share, sem="relaxed")


def checksum_launch(tensors: Sequence[Tensor]) -> Tensor:
    """See :func:`ttt_fast.ops.checksum`. Tensors of short runs (transposed ones) are copied first.

    Returns:
        0-dim int64 on the CPU, which waits for the device.

    Raises:
        ValueError: elements of more than 8 bytes.
    """
    plain = []
    for position, tensor in enumerate(tensors):
        if tensor.itemsize not in INTEGERS:
            raise ValueError(
                f"checksum: tensors[{position}] is {tensor.dtype}, whose elements have"
                f" {tensor.itemsize} bytes; at most 8 are supported."
            )
        plain.append(as_integers(tensor))
    lists, _ = with_long_runs([plain], {})
    totals: dict[torch.device, Tensor] = {}
    for table in pointer_tables(lists, CHUNK):
        device = table.numel.device
        if device not in totals:
            totals[device] = torch.zeros((), dtype=torch.int64, device=device)
        with torch.cuda.device_of(table.numel):
            checksum_kernel[(table.n_chunks,)](
                table.pointers, table.numel, table.index, table.tensor, table.n_chunks,
                totals[device], **_constants(table.dtypes[0], table.aligned),
                num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip
    return sum((total.cpu() for total in totals.values()), torch.zeros((), dtype=torch.int64))


def _constants(dtype: torch.dtype, aligned: bool) -> dict[str, object]:
    return {"DTYPE": TRITON_INTEGERS[dtype], "ALIGNED": aligned, "BLOCK": BLOCK}


CASES = [
    Case(
        f"{8 * size} bits", checksum_kernel,
        {
            "pointers": "*i64", "numels": "*i32", "index": "*i64", "tensors": "*i32",
            "n_chunks": "i32", "total": "*i64",
        },
        _constants(dtype, True), NUM_WARPS,
        divisible=("pointers", "numels", "index", "tensors", "total"),
        bytes_per_element=size, block=BLOCK,
    )
    for size, dtype in INTEGERS.items()
]  # fmt: skip
