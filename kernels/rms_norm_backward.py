"""Gradients of the root mean square norm at its input and at the weight of each delta.

Fused: both gradients, all conversions and roundings; stock torch takes about twelve passes. A
program takes some consecutive tokens of a delta, tile by tile, and keeps their share of the
weight's gradient in registers; a second, tiny launch adds up the shares of a delta in a fixed order
where there is more than one. Rows that are too wide for registers are swept twice in blocks, the
second time from the L2 cache.

Bytes per element: two reads and one write, 6 in 16 bits and 12 in float32, beside the weight and
its gradient (8 bytes a column for each program). Bound: memory bandwidth, or the launch itself
where tokens are few. Widths that are no multiple of 16 are accessed element by element.
Reference: rms_norm_backward in ttt_fast/layer_reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import pointer_to
from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.rms_norm import (
    Tiles,
    case_name,
    load_tile,
    mean_of_rows,
    rounded,
    store_tile,
    tiles_for,
)
from ttt_fast.rounding import compute_dtype

# A program takes more tiles where there are so many programs all the same: two for each of the 100
# to 150 multiprocessors of a GPU.
MOST_TILES = 16
ENOUGH_PROGRAMS = 256
# Tile of the second launch: programs' shares by columns.
FINISH_TILE = {"ROWS": 16, "COLUMNS": 128}
FINISH_WARPS = 4


# ---------------------------------------------------------------------------- kernels


@triton.jit
def _dx(g, h, mean, factor):
    return (g - h * mean[:, None]) * factor[:, None]


@triton.jit(do_not_specialize=["tokens", "span"])
def rms_norm_backward_kernel(
    dy,  # (B, M, D)
    x,  # (B, M, D)
    weight,  # (B, D)
    rstd,  # (B, M)
    dx,  # (B, M, D)
    shares,  # (B, programs of a delta, D)
    tokens,
    width,
    span,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWEPT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    """The next ``span`` tokens of one delta; a single tile where rows are swept."""
    WIDE: tl.constexpr = rstd.dtype.element_ty
    STORED: tl.constexpr = x.dtype.element_ty
    delta = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    begin = tl.program_id(0) * span
    end = tl.minimum(begin + span, tokens)
    first = delta * tokens + begin
    dy += first * width
    x += first * width
    dx += first * width
    rstd += first
    weight += delta * width
    shares += (delta * tl.num_programs(0) + tl.program_id(0)) * width

    if SWEPT:
        rows = tl.arange(0, ROWS)
        in_rows = rows < end - begin
        factor = tl.load(rstd + rows, mask=in_rows, other=0.0)
        products = tl.zeros((ROWS, BLOCK), dtype=WIDE)
        for start in range(0, width, BLOCK):
            places = start + columns
            w = tl.load(weight + places, mask=places < width, other=0.0)
            g = load_tile(dy, in_rows, places, width, WIDE) * w[None, :]
            h = load_tile(x, in_rows, places, width, WIDE) * factor[:, None]
            products += g * h
        mean = mean_of_rows(products, width)
        for start in range(0, width, BLOCK):
            places = start + columns
            w = tl.load(weight + places, mask=places < width, other=0.0)
            wide_dy = load_tile(dy, in_rows, places, width, WIDE)
            h = load_tile(x, in_rows, places, width, WIDE) * factor[:, None]
            store_tile(dx, _dx(wide_dy * w[None, :], h, mean, factor), in_rows, places, width)
            share = tl.sum(wide_dy * rounded(h, STORED, ROUND_FIRST), 0)
            tl.store(shares + places, share, mask=places < width)
    else:
        w = tl.load(weight + columns, mask=columns < width, other=0.0)
        share = tl.zeros((ROWS, BLOCK), dtype=WIDE)
        for start in range(0, end - begin, ROWS):
            rows = tl.arange(0, ROWS)
            in_rows = start + rows < end - begin
            factor = tl.load(rstd + start + rows, mask=in_rows, other=0.0)
            wide_dy = load_tile(dy + start * width, in_rows, columns, width, WIDE)
            h = load_tile(x + start * width, in_rows, columns, width, WIDE) * factor[:, None]
            g = wide_dy * w[None, :]
            mean = mean_of_rows(g * h, width)
            store_tile(dx + start * width, _dx(g, h, mean, factor), in_rows, columns, width)
            share += wide_dy * rounded(h, STORED, ROUND_FIRST)
        tl.store(shares + columns, tl.sum(share, 0), mask=columns < width)


@triton.jit(do_not_specialize=["programs"])
def rms_norm_finish_kernel(
    shares, dweight, programs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Add up the shares of some columns of one delta."""
    delta = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    WIDE: tl.constexpr = shares.dtype.element_ty
    sums = tl.zeros((ROWS, COLUMNS), dtype=WIDE)
    for start in range(0, programs, ROWS):
        in_rows = start + rows < programs
        tile = shares + (delta * programs + start) * width
        sums += load_tile(tile, in_rows, columns, width, WIDE)
    tl.store(dweight + delta * width + columns, tl.sum(sums, 0), mask=columns < width)


# ---------------------------------------------------------------------------- launch


def rms_norm_backward_launch(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, round_first: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`ttt_fast.ops.rms_norm_backward`, which checks the arguments.

    Tensors that are not contiguous are copied.
    """
    dy, x, weight, rstd = (t.contiguous() for t in (dy, x, weight, rstd))
    batch, tokens, width = x.shape
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight)
    tiles = tiles_for(width, x.dtype)
    span = _span(tiles, tokens, batch)
    programs = triton.cdiv(tokens, span)
    shares = weight.new_empty(batch, programs, width)
    rms_norm_backward_kernel[(programs, batch)](
        dy, x, weight, rstd, dx, shares, tokens, width, span, **tiles.constants(round_first),
        num_warps=tiles.num_warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    if programs == 1:
        return dx, shares.squeeze(1)
    dweight = torch.empty_like(weight)
    rms_norm_finish_kernel[(triton.cdiv(width, FINISH_TILE["COLUMNS"]), batch)](
        shares, dweight, programs, width, **FINISH_TILE, num_warps=FINISH_WARPS,
        num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return dx, dweight


def _span(tiles: Tiles, tokens: int, batch: int) -> int:
    """Tokens of a program."""
    span = tiles.rows * (1 if tiles.swept else MOST_TILES)
    while span > tiles.rows and batch * triton.cdiv(tokens, span) < ENOUGH_PROGRAMS:
        span //= 2
    return span


# ---------------------------------------------------------------------------- machine code


def _case(dtype: torch.dtype, width: int, bytes_per_element: float | None = None) -> Case:
    """Bytes are those of dy, x and dx, and of the weight and its gradient as in the forward."""
    tiles = tiles_for(width, dtype)
    pointers = dict.fromkeys(("dy", "x", "dx"), pointer_to(dtype))
    pointers |= dict.fromkeys(("weight", "rstd", "shares"), pointer_to(compute_dtype(dtype)))
    return Case(
        case_name(tiles, dtype, width), rms_norm_backward_kernel,
        pointers | dict.fromkeys(("tokens", "width", "span"), "i32"), tiles.constants(True),
        tiles.num_warps, divisible=(*pointers, *["width"] * (width % 16 == 0)),
        bytes_per_element=bytes_per_element,
        block=None if bytes_per_element is None else tiles.rows * tiles.block,
    )  # fmt: skip


def _finish_case(wide: torch.dtype) -> Case:
    signature = dict.fromkeys(("shares", "dweight"), pointer_to(wide))
    return Case(
        f"shares of {pointer_to(wide)[1:]}", rms_norm_finish_kernel,
        signature | {"programs": "i32", "width": "i32"}, FINISH_TILE, FINISH_WARPS,
        divisible=("shares", "dweight", "width"),
    )  # fmt: skip


CASES = [
    _case(torch.bfloat16, 64),
    _case(torch.bfloat16, 1024),
    _case(torch.bfloat16, 4096, 14),
    _case(torch.bfloat16, 8192, 14),
    _case(torch.bfloat16, 16384),
    _case(torch.bfloat16, 4095),
    _case(torch.bfloat16, 4097),
    _case(torch.float32, 4095),
    _case(torch.float16, 4096, 14),
    _case(torch.float32, 4096, 20),
    _case(torch.float32, 8192, 20),
    _case(torch.float64, 2048, 40),
    _case(torch.float64, 4096),
    _finish_case(torch.float32),
    _finish_case(torch.float64),
]
