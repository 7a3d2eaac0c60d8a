"""Copy a list of tensors, one launch for each combination of element sizes.

Fused: the list. Equal types are copied as integers, bit for bit; floating-point types that differ
are converted, each element rounded once (from float64 to 16 bits by way of float32, as torch does).
Bytes per element: read and write of the element, 4 in bfloat16 and 8 in float32; 20 bytes of tables
for a chunk of 8192. Bound: memory bandwidth.
Reference: copy_ in ttt_fast/reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import TRITON_DTYPES, chunk_pointer, read, write
from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.pointer_table import has_long_runs, pointer_tables

# Elements of a program, as a straight line: all its loads are on their way before the first store.
BLOCK = 8192
NUM_WARPS = 8

# Bytes of an element -> the integers that have its bits.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TRITON_INTEGERS = {
    torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64,
}  # fmt: skip


@triton.jit
def _converted(x, DTYPE: tl.constexpr):
    if x.dtype != DTYPE and DTYPE != tl.float64:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit(do_not_specialize=["n_chunks"])
def copy_kernel(
    pointers, numels, n_chunks, DST: tl.constexpr, SRC: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy one chunk; a full one without masks."""
    chunk = tl.program_id(0)
    numel = tl.load(numels + chunk)
    dst = chunk_pointer(pointers, n_chunks, chunk, 0, DST, ALIGNED)
    src = chunk_pointer(pointers, n_chunks, chunk, 1, SRC, ALIGNED)
    i = tl.arange(0, BLOCK)
    if numel == BLOCK:
        write(dst + i, _converted(read(src + i, None, False), DST), None, False)
    else:
        write(dst + i, _converted(read(src + i, i < numel, True), DST), i < numel, True)


def copy_launch(dsts: Sequence[Tensor], srcs: Sequence[Tensor]) -> None:
    """See :func:`ttt_fast.ops.copy_`; here the dtypes of a pair may differ.

    Complex and mixed integer types, and tensors of short runs (transposed ones), are torch's.

    Raises:
        ValueError: a destination is expanded.
    """
    ours: tuple[list[Tensor], list[Tensor]] = ([], [])
    for dst, src in zip(dsts, srcs, strict=True):
        pair = _as_stored(dst, src)
        if pair is None or not (has_long_runs(dst) and has_long_runs(src)):
            dst.copy_(src)
            continue
        for tensors, tensor in zip(ours, pair, strict=True):
            tensors.append(tensor)
    for table in pointer_tables(ours, BLOCK, written={0: "dsts"}):
        copy_kernel[(table.n_chunks,)](
            table.pointers, table.numel, table.n_chunks, **_constants(table.dtypes, table.aligned),
            num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


def _as_stored(dst: Tensor, src: Tensor) -> tuple[Tensor, Tensor] | None:
    """The pair as the kernel takes it; None if it does not."""
    if dst.dtype.is_complex or src.dtype.is_complex:
        return None
    if dst.dtype == src.dtype:
        return as_integers(dst), as_integers(src)
    return (dst, src) if {dst.dtype, src.dtype} <= set(TRITON_DTYPES) else None


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory as integers of the size of its elements."""
    return tensor.detach().view(INTEGERS[tensor.itemsize])


def _constants(dtypes: Sequence[torch.dtype], aligned: bool) -> dict[str, object]:
    dst, src = ((TRITON_DTYPES | TRITON_INTEGERS)[dtype] for dtype in dtypes)
    return {"DST": dst, "SRC": src, "ALIGNED": aligned, "BLOCK": BLOCK}


def _case(name: str, dst: torch.dtype, src: torch.dtype) -> Case:
    return Case(
        name, copy_kernel, {"pointers": "*i64", "numels": "*i32", "n_chunks": "i32"},
        _constants((dst, src), True), NUM_WARPS, divisible=("pointers", "numels"),
        bytes_per_element=dst.itemsize + src.itemsize, block=BLOCK,
    )  # fmt: skip


CASES = [
    *(_case(f"{8 * size} bits", dtype, dtype) for size, dtype in INTEGERS.items()),
    _case("float32 to bfloat16", torch.bfloat16, torch.float32),
    _case("bfloat16 to float32", torch.float32, torch.bfloat16),
]
