"""Root mean square norm of tokens with a weight for each delta; a program takes a tile of tokens.

Fused: conversion, mean of squares, scaling, weight, roundings; stock torch takes six passes. A tile
is whole rows, which are read once and stay in registers; rows that are too wide for that are swept
twice in blocks, the second time from the L2 cache. Narrow rows (norms of attention heads) share a
tile.

Bytes per element: one read and one write, 4 in 16 bits and 8 in float32, beside the weight, which
all tokens of a delta share, and one number a token. Bound: memory bandwidth, or the launch itself
where tokens are few. Widths that are no multiple of 16 are accessed element by element.
Reference: rms_norm in ttt_fast/layer_reference.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import divide, pointer_to, scalar, square_root
from ttt_fast.kernels.machine_code import Case
from ttt_fast.rounding import compute_dtype

# Of a tile, in the compute type: the backward has six such numbers for each element at a time.
BYTES_PER_THREAD = 64
FEWEST_WARPS = 4
MOST_WARPS = 16
# A thread of 16 warps has too few registers for float64, or for accesses element by element.
MOST_HEAVY_WARPS = 8
NARROWEST = 64
SWEPT_ROWS = 8


class Tiles(NamedTuple):
    """How the tokens of a delta are cut up.

    Attributes:
        rows: tokens of a tile.
        block: columns of a tile, a power of two.
        num_warps: launch option.
        swept: rows are wider than a tile.
    """

    rows: int
    block: int
    num_warps: int
    swept: bool

    def constants(self, round_first: bool) -> dict[str, Any]:
        """Compile-time arguments of both kernels."""
        tile = {"ROWS": self.rows, "BLOCK": self.block, "SWEPT": self.swept}
        return tile | {"ROUND_FIRST": round_first}


def tiles_for(width: int, dtype: torch.dtype) -> Tiles:
    """Tiles for rows of a width in a storage type."""
    heavy = dtype == torch.float64 or width % 16 > 0
    most_warps = MOST_HEAVY_WARPS if heavy else MOST_WARPS
    per_warp = 32 * BYTES_PER_THREAD // compute_dtype(dtype).itemsize
    block = max(NARROWEST, triton.next_power_of_2(width))
    if block > most_warps * per_warp:
        return Tiles(SWEPT_ROWS, most_warps * per_warp // SWEPT_ROWS, most_warps, True)
    num_warps = max(FEWEST_WARPS, block // per_warp)
    return Tiles(num_warps * per_warp // block, block, num_warps, False)


# ---------------------------------------------------------------------------- kernel


@triton.jit
def load_tile(pointer, in_rows, columns, width, WIDE: tl.constexpr):
    """Columns of rows of a contiguous matrix, in the compute type; 0 outside."""
    rows = tl.arange(0, in_rows.shape[0])
    place = rows[:, None] * width + columns[None, :]
    inside = in_rows[:, None] & (columns < width)[None, :]
    return tl.load(pointer + place, mask=inside, other=0.0).to(WIDE)


@triton.jit
def store_tile(pointer, values, in_rows, columns, width):
    """Round a tile and store it where :func:`load_tile` has it from."""
    rows = tl.arange(0, in_rows.shape[0])
    place = rows[:, None] * width + columns[None, :]
    inside = in_rows[:, None] & (columns < width)[None, :]
    tl.store(pointer + place, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def rounded(values, STORED: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """The values as the storage type has them, with ROUND_FIRST."""
    if ROUND_FIRST:
        return values.to(STORED).to(values.dtype)
    else:
        return values


@triton.jit
def mean_of_rows(values, width):
    """Sum of each row of a tile, divided by the width."""
    # A width of 1 is a compile-time constant.
    return divide(tl.sum(values, 1), tl.full((), width, values.dtype))


# The width is that of a model, and whether it is a multiple of 16 decides the width of accesses.
@triton.jit(do_not_specialize=["tokens"])
def rms_norm_kernel(
    x,  # (B, M, D)
    weight,  # (B, D)
    y,  # (B, M, D)
    rstd,  # (B, M)
    tokens,
    width,
    eps: tl.float64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWEPT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """One tile of tokens of one delta."""
    WIDE: tl.constexpr = rstd.dtype.element_ty
    delta = tl.program_id(1).to(tl.int64)
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    in_rows = rows < tokens
    first = delta * tokens + tl.program_id(0) * ROWS
    x += first * width
    y += first * width
    weight += delta * width

    if SWEPT:
        squares = tl.zeros((ROWS, BLOCK), dtype=WIDE)
        for start in range(0, width, BLOCK):
            values = load_tile(x, in_rows, start + columns, width, WIDE)
            squares += values * values
    else:
        values = load_tile(x, in_rows, columns, width, WIDE)
        w = tl.load(weight + columns, mask=columns < width, other=0.0)
        squares = values * values
    mean = mean_of_rows(squares, width)
    factor = divide(tl.full((), 1.0, WIDE), square_root(mean + scalar(eps, WIDE)))
    tl.store(rstd + delta * tokens + rows, factor, mask=in_rows)
    # A single turn, known as such to the compiler, unless rows are swept.
    for start in range(0, width if SWEPT else BLOCK, BLOCK):
        places = start + columns
        if SWEPT:
            values = load_tile(x, in_rows, places, width, WIDE)
            w = tl.load(weight + places, mask=places < width, other=0.0)
        h = rounded(values * factor[:, None], x.dtype.element_ty, ROUND_FIRST)
        store_tile(y, h * w[None, :], in_rows, places, width)


# ---------------------------------------------------------------------------- launch


def rms_norm_launch(
    x: Tensor, weight: Tensor, *, eps: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`ttt_fast.ops.rms_norm`, which checks the arguments.

    Tensors that are not contiguous are copied.
    """
    x, weight = x.contiguous(), weight.contiguous()
    batch, tokens, width = x.shape
    y, rstd = torch.empty_like(x), weight.new_empty(batch, tokens)
    if rstd.numel() > 0:
        tiles = tiles_for(width, x.dtype)
        rms_norm_kernel[(triton.cdiv(tokens, tiles.rows), batch)](
            x, weight, y, rstd, tokens, width, eps, **tiles.constants(round_first),
            num_warps=tiles.num_warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y, rstd


# ---------------------------------------------------------------------------- machine code


def case_name(tiles: Tiles, dtype: torch.dtype, width: int) -> str:
    """Name of a case of either kernel."""
    name = f"{str(dtype).removeprefix('torch.')}, {tiles.rows} x {tiles.block}"
    return name + ", swept" * tiles.swept + ", odd width" * (width % 16 > 0)


def _case(dtype: torch.dtype, width: int, bytes_per_element: float | None = None) -> Case:
    """Bytes are those of x, y and the weight, whose share is exact where a tile is one row."""
    tiles = tiles_for(width, dtype)
    storage, wide = pointer_to(dtype), pointer_to(compute_dtype(dtype))
    pointers = {"x": storage, "weight": wide, "y": storage, "rstd": wide}
    return Case(
        case_name(tiles, dtype, width), rms_norm_kernel,
        pointers | {"tokens": "i32", "width": "i32", "eps": "fp64"}, tiles.constants(True),
        tiles.num_warps, divisible=(*pointers, *["width"] * (width % 16 == 0)),
        bytes_per_element=bytes_per_element,
        block=None if bytes_per_element is None else tiles.rows * tiles.block,
    )  # fmt: skip


CASES = [
    _case(torch.bfloat16, 64),
    _case(torch.bfloat16, 1024),
    _case(torch.bfloat16, 4096, 8),
    _case(torch.bfloat16, 8192, 8),
    _case(torch.bfloat16, 16384),
    _case(torch.bfloat16, 4095),
    _case(torch.bfloat16, 4097),
    _case(torch.float16, 4096, 8),
    _case(torch.float32, 4096, 12),
    _case(torch.float64, 2048, 24),
    _case(torch.float64, 4096),
]
