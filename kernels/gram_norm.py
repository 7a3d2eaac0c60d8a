"""Squared norms of gradients dyᵀ x from the Gram matrices of x and of dy.

Fused: both Gram matrices, their elementwise product and its sum. A program has one tile of tokens
by tokens of both in registers; neither leaves the chip. They are symmetric: only tiles on and above
the diagonal are computed, those above count twice. One launch serves all deltas, and gram_norms.py
has one for all layers of a step; a second, tiny one adds up the tiles of a delta in a fixed order
where there is more than one.

Bytes moved: every tile reads the rows of its tokens, so x and dy are read (n + 1) / 2 times where a
delta has n tiles of tokens (once up to 64 tokens if there are enough programs), from the L2 cache
after the first. Written: one number a tile. Bound: memory bandwidth for short prompts, tensor cores
for long ones; float32 has none that are exact and multiplies on the ordinary ones.
Reference: gram_norm in ttt_fast/factor_reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import pointer_to
from ttt_fast.kernels.machine_code import Case
from ttt_fast.rounding import compute_dtype

# Smaller tiles read more but make more programs: a GPU has 100 to 150 multiprocessors to fill.
TILES = (64, 32)
SMALLEST_TILE = 16
ENOUGH_PROGRAMS = 128
# Bytes of a row that one round of the loop multiplies.
ROUND_BYTES = 128
NUM_STAGES = 4
FINISH_BLOCK = 256


# ---------------------------------------------------------------------------- kernels


@triton.jit
def _gram_tile(
    matrix,
    row_stride,
    width,
    tokens,
    i,
    j,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scalar products of the tokens of tile row i with those of tile column j."""
    WIDE: tl.constexpr = tl.float64 if matrix.dtype.element_ty == tl.float64 else tl.float32
    # Loads of 16 bytes. A product says what it is a multiple of; tl.multiple_of on an argument of
    # this function is lost.
    VECTOR: tl.constexpr = 128 // matrix.dtype.element_ty.primitive_bitwidth
    row_stride = row_stride // VECTOR * VECTOR
    width = width // VECTOR * VECTOR
    columns = tl.arange(0, BLOCK)
    left_rows = i * TILE + tl.arange(0, TILE)
    right_rows = j * TILE + tl.arange(0, TILE)
    left = matrix + left_rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    right = matrix + right_rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    gram = tl.zeros((TILE, TILE), dtype=WIDE)
    for start in range(0, width, BLOCK):
        inside = (start + columns < width)[None, :]
        a = tl.load(left + start, mask=inside & (left_rows < tokens)[:, None], other=0.0)
        b = tl.load(right + start, mask=inside & (right_rows < tokens)[:, None], other=0.0)
        gram = tl.dot(a, tl.trans(b), gram, input_precision="ieee", out_dtype=WIDE)
    return gram


@triton.jit
def store_partial(
    x,
    dy,
    x_row_stride,
    dy_row_stride,
    x_width,
    dy_width,
    partial,
    tokens,
    tile,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """What one tile of a delta adds to its squared norm."""
    # The triangle of n rows folded to a rectangle: row r and row n - 1 - r have n + 1 tiles.
    n = tl.cdiv(tokens, TILE)
    r = tile // (n + 1)
    c = tile % (n + 1)
    i = tl.where(c < n - r, r, n - 1 - r)
    j = tl.where(c < n - r, r + c, c - 1)
    gram = _gram_tile(x, x_row_stride, x_width, tokens, i, j, TILE, BLOCK)
    gram *= _gram_tile(dy, dy_row_stride, dy_width, tokens, i, j, TILE, BLOCK)
    squared = tl.sum(gram)
    if SINGLE:
        # Not tl.maximum, which drops a NaN.
        squared = tl.where(squared < 0.0, 0.0, squared)
    else:
        squared *= tl.where(i == j, 1.0, 2.0).to(gram.dtype)
    tl.store(partial, squared)


@triton.jit(
    do_not_specialize=[
        "x_delta_stride", "x_row_stride", "x_width", "dy_delta_stride", "dy_row_stride", "dy_width",
        "tokens",
    ]
)  # fmt: skip
def gram_norm_kernel(
    x,  # (B, M, in)
    dy,  # (B, M, out)
    partials,  # (B, tiles)
    x_delta_stride,
    x_row_stride,
    x_width,
    dy_delta_stride,
    dy_row_stride,
    dy_width,
    tokens,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """One tile of one delta."""
    tile = tl.program_id(0)
    delta = tl.program_id(1).to(tl.int64)
    x += delta * x_delta_stride
    dy += delta * dy_delta_stride
    x, dy = tl.multiple_of(x, 16), tl.multiple_of(dy, 16)
    store_partial(
        x, dy, x_row_stride, dy_row_stride, x_width, dy_width,
        partials + delta * tl.num_programs(0) + tile, tokens, tile, TILE, BLOCK, SINGLE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def gram_norm_finish_kernel(partials, norms, tiles, BLOCK: tl.constexpr):
    """Add up the tiles of one delta."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=partials.dtype.element_ty)
    for start in range(0, tiles, BLOCK):
        inside = start + columns < tiles
        sums += tl.load(partials + program * tiles + start + columns, mask=inside, other=0.0)
    squared = tl.sum(sums)
    # Tokens that cancel each other leave rounding errors of either sign.
    tl.store(norms + program, tl.where(squared < 0.0, 0.0, squared))


# ---------------------------------------------------------------------------- launches


def gram_norm_launch(x: Tensor, dy: Tensor) -> Tensor:
    """See :func:`ttt_fast.ops.gram_norm`, which checks the arguments.

    Odd widths, odd addresses and strided columns are copied first: see :func:`aligned`.
    """
    batch, tokens, _ = x.shape
    if 0 in (*x.shape, dy.shape[2]):
        return x.new_zeros(batch, dtype=compute_dtype(x.dtype))
    x, dy = aligned(x), aligned(dy)
    options, tiles = options_for(tokens, batch, x.dtype)
    partials = x.new_empty(batch, tiles, dtype=compute_dtype(x.dtype))
    gram_norm_kernel[(tiles, batch)](
        x, dy, partials, x.stride(0), x.stride(1), x.shape[2], dy.stride(0), dy.stride(1),
        dy.shape[2], tokens, **options,
    )  # fmt: skip
    return finish(partials)


def aligned(t: Tensor) -> Tensor:
    """Return ``t`` if its rows may be read 16 bytes at a time, else a copy padded with zeros.

    Read two bytes at a time, as it would have to be, the kernel would not fit the registers.
    """
    vector = 16 // t.itemsize
    strides = [t.stride(d) for d in (0, 1) if t.shape[d] > 1]
    if t.stride(2) == 1 and not any(n % vector for n in (*strides, t.shape[2])):
        if t.data_ptr() % 16 == 0:
            return t
    width = max(1, triton.cdiv(t.shape[2], vector)) * vector
    padded = t.new_zeros(*t.shape[:2], width)
    padded[:, :, : t.shape[2]] = t
    return padded


def options_for(tokens: int, deltas: int, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    """Compile-time arguments and launch options, and the number of tiles of a delta."""

    def tiles_of(tile: int) -> int:
        n = triton.cdiv(tokens, tile)
        return n * (n + 1) // 2

    # Half of a tile would be empty if all tokens fitted one of half the size.
    fitting = [t for t in TILES if tokens > t // 2 and deltas * tiles_of(t) >= ENOUGH_PROGRAMS]
    # Accumulators of float64 take twice the registers.
    fitting = [t for t in fitting if t * dtype.itemsize <= 256]
    tile = fitting[0] if fitting else SMALLEST_TILE
    tiles = tiles_of(tile)
    compiled = constants(tile, dtype) | {"SINGLE": tiles == 1}
    return compiled | launch_options(tile) | {"enable_fp_fusion": False}, tiles


def constants(tile: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of a tile; a launch has SINGLE beside them."""
    return {"TILE": tile, "BLOCK": ROUND_BYTES // dtype.itemsize}


def launch_options(tile: int) -> dict[str, Any]:
    """Warps and stages of a tile."""
    return {"num_warps": max(1, tile // 16), "num_stages": NUM_STAGES}


def finish(partials: Tensor) -> Tensor:
    """Add up the tiles, the last dimension."""
    tiles = partials.shape[-1]
    if tiles == 1:
        return partials.squeeze(-1)
    norms = partials.new_empty(partials.shape[:-1])
    gram_norm_finish_kernel[(norms.numel(),)](
        partials,
        norms,
        tiles,
        BLOCK=FINISH_BLOCK,
        num_warps=1,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return norms


# ---------------------------------------------------------------------------- machine code


def _case(dtype: torch.dtype, tile: int) -> Case:
    ints = ("x_delta_stride", "x_row_stride", "x_width", "dy_delta_stride", "dy_row_stride",
            "dy_width", "tokens")  # fmt: skip
    pointers = dict.fromkeys(("x", "dy"), pointer_to(dtype))
    pointers["partials"] = pointer_to(compute_dtype(dtype))
    return Case(
        f"{str(dtype).removeprefix('torch.')}, tiles of {tile}", gram_norm_kernel,
        pointers | dict.fromkeys(ints, "i32"),
        constants(tile, dtype) | {"SINGLE": False}, **launch_options(tile),
        divisible=tuple(pointers), dot=dtype != torch.float32,
    )  # fmt: skip


CASES = [
    *(_case(torch.bfloat16, tile) for tile in (*TILES, SMALLEST_TILE)),
    *(_case(torch.float32, tile) for tile in (*TILES, SMALLEST_TILE)),
    _case(torch.float16, 64),
    _case(torch.float64, 32),
    Case(
        "float32", gram_norm_finish_kernel,
        {"partials": "*fp32", "norms": "*fp32", "tiles": "i32"}, {"BLOCK": FINISH_BLOCK},
        num_warps=1, divisible=("partials", "norms"),
    ),
]  # fmt: skip
