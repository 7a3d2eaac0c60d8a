"""What kernels do with a block of elements, whatever they compute.

Names of types, addresses from a table, accesses with and without a mask, and the operations that
``reference.py`` rounds correctly and a GPU, left to itself, does not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Partial sums that a launch of one program adds up in a round of its loop.
SUMS_BLOCK = 8192
SUMS_WARPS = 16

# Triton's names of the storage types.
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def pointer_to(dtype: torch.dtype) -> str:
    """The type of a pointer as it stands in a signature, "*bf16"."""
    return f"*{TRITON_DTYPES[dtype].name}"


@triton.jit
def chunk_pointer(
    pointers, n_chunks, chunk, LIST: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pointer to a chunk's first element in one of the lists."""
    pointer = tl.load(pointers + LIST * n_chunks + chunk).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # After the cast: before it, Triton 3.9 forgets the hint and emits 2-byte loads.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def read(pointer, mask, MASKED: tl.constexpr):
    """Load a block, 0 where masked."""
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def write(pointer, value, mask, MASKED: tl.constexpr):
    """Store a block where not masked."""
    if MASKED:
        tl.store(pointer, value, mask=mask)
    else:
        tl.store(pointer, value)


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """A launcher's float64 argument, rounded once to the compute type."""
    return tl.full((), value, tl.float64).to(DTYPE)


@triton.jit
def divide(x, y):
    """Correctly rounded quotient; a plain float32 ``/`` is an approximation on a GPU."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    """Correctly rounded square root."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)
