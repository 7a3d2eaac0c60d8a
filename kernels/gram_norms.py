"""Squared norms of the gradients dyᵀ x of many layers in one launch.

Fused: what gram_norm.py fuses, whose tiles these are, for all pairs of x and dy. Where a pair lies
stands in a table. A session's rows lie in buffers, one behind the other, and those of a step begin
at the same row of all: that row is an argument of the launch and not part of the table, so that one
table serves every step, and a step uploads nothing. Where the addresses themselves change, a new
table is an upload of 80 bytes a pair that nothing waits for.

Bytes moved and bound: as in gram_norm.py; the pairs fill the GPU together.
Reference: gram_norms in ttt_fast/factor_reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import TRITON_DTYPES, pointer_to
from ttt_fast.kernels.gram_norm import (
    aligned,
    constants,
    finish,
    launch_options,
    options_for,
    store_partial,
)
from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.pointer_table import device_integers
from ttt_fast.rounding import compute_dtype

# What a table has of a tensor: see _place.
NUMBERS = tl.constexpr(5)


@triton.jit
def _first(place, first_row, delta, DTYPE: tl.constexpr):
    """Pointer to the first row of a delta."""
    address = tl.load(place) + first_row * tl.load(place + 1)
    pointer = address.to(tl.pointer_type(DTYPE)) + delta * tl.load(place + 2)
    return tl.multiple_of(pointer, 16)


@triton.jit(do_not_specialize=["first_row", "tokens", "tiles"])
def gram_norms_kernel(
    table,  # (P, 2, NUMBERS) int64: _place of x and of dy
    partials,  # (P, B, tiles)
    first_row,
    tokens,
    tiles,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """One tile of one delta of one pair."""
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    delta = tl.program_id(1).to(tl.int64)
    x = table + pair * (2 * NUMBERS)
    dy = x + NUMBERS
    store_partial(
        _first(x, first_row, delta, DTYPE), _first(dy, first_row, delta, DTYPE),
        tl.load(x + 3), tl.load(dy + 3), tl.load(x + 4).to(tl.int32), tl.load(dy + 4).to(tl.int32),
        partials + (pair * tl.num_programs(1) + delta) * tiles + tile, tokens, tile,
        TILE, BLOCK, SINGLE,
    )  # fmt: skip


def gram_norms_launch(xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Tensor:
    """See :func:`ttt_fast.ops.gram_norms`, which checks the arguments.

    Odd widths, odd addresses and strided columns are copied first.
    """
    batch, tokens, _ = xs[0].shape
    dtype, device, wide = xs[0].dtype, xs[0].device, compute_dtype(xs[0].dtype)
    if batch == 0 or tokens == 0:
        return torch.zeros(len(xs), batch, dtype=wide, device=device)
    row_stride = xs[0].stride(1)
    first_row = xs[0].storage_offset() // row_stride if row_stride else 0
    given = [t for pair in zip(xs, dys, strict=True) for t in pair]
    # They hold the copies, of which the table has only the addresses, until the launch.
    read = [aligned(t) for t in given]
    places = [_place(t, first_row, t is own) for t, own in zip(read, given, strict=True)]
    table = device_integers([n for place in places for n in place], device)
    options, tiles = options_for(tokens, batch * len(xs), dtype)
    partials = torch.empty(len(xs), batch, tiles, dtype=wide, device=device)
    gram_norms_kernel[(len(xs) * tiles, batch)](
        table, partials, first_row, tokens, tiles, DTYPE=TRITON_DTYPES[dtype], **options
    )
    return finish(partials)


def _place(t: Tensor, first_row: int, in_buffer: bool) -> tuple[int, ...]:
    """Where a tensor (B, M, width) lies, with the rows in front of it taken off.

    Address of row 0 and bytes from row to row of what it is a part of; both strides; its width. A
    copy is no part of anything: its address is the same whatever the first row.
    """
    step = t.stride(1) * t.itemsize if in_buffer else 0
    return t.data_ptr() - first_row * step, step, t.stride(0), t.stride(1), t.shape[2]


# ---------------------------------------------------------------------------- machine code


def _case(dtype: torch.dtype, tile: int) -> Case:
    ints = dict.fromkeys(("first_row", "tokens", "tiles"), "i32")
    return Case(
        f"{str(dtype).removeprefix('torch.')}, tiles of {tile}", gram_norms_kernel,
        {"table": "*i64", "partials": pointer_to(compute_dtype(dtype))} | ints,
        constants(tile, dtype) | {"DTYPE": TRITON_DTYPES[dtype], "SINGLE": False},
        **launch_options(tile), divisible=("table", "partials"), dot=dtype != torch.float32,
    )  # fmt: skip


CASES = [
    _case(torch.bfloat16, 64),
    _case(torch.bfloat16, 16),
    _case(torch.float32, 64),
    _case(torch.float32, 16),
    _case(torch.float64, 32),
]
