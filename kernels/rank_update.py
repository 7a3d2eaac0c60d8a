"""W ← round(scale·W + dyᵀ diag(β) x): a product of factors added to a weight in place.

Fused: the product, whose sums stay in float32, the scaling of W, the addition and the rounding, to
nearest or stochastic with the bits of every other backend. The gradient dyᵀ x is nowhere in memory.
β multiplies dy in float32. 16-bit factors then go to the tensor cores, dy·β as two terms
(two_terms.py); float32 factors are multiplied without tensor cores (IEEE), float64 in float64.

Bytes moved, computed: 2 of W for each element of 16 bits, read and written, so 4; and x and dy once
for each row or column of tiles that reads them, from cache where they fit it. Bound, from peak
rates: memory below 160 rows of factors on an A100, 290 on an H100; above, arithmetic. The number of
rows is a run-time value that nothing is specialised on. β is on the device, scale may be, and
nothing is waited for.

Reference: rank_update_ in ttt_fast/factor_reference.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import TRITON_DTYPES, pointer_to
from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.rounding import random_bits, random_key, round_stochastic, seed_key
from ttt_fast.kernels.two_terms import two_terms
from ttt_fast.rounding import compute_dtype

# Rows of tiles whose tiles come one after the other: they share what they read of x and dy.
GROUP = 8
# Larger tiles read the factors less often; from here on each of 132 multiprocessors has two.
MANY_TILES = 264


class Tiles(NamedTuple):
    """Tile of the weight, rows of factors in one turn of the loop, and the launch options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Small and large, by the type of the product.
TILES = {
    torch.bfloat16: (Tiles(64, 64, 32, 4, 3), Tiles(128, 128, 32, 8, 3)),
    torch.float16: (Tiles(64, 64, 32, 4, 3), Tiles(128, 128, 16, 8, 3)),
    # Without tensor cores a product is an instruction of every thread, and the loop is unrolled.
    torch.float32: (Tiles(32, 32, 16, 4, 3), Tiles(64, 64, 16, 4, 3)),
    torch.float64: (Tiles(32, 32, 16, 4, 2), Tiles(32, 32, 16, 4, 2)),
}  # fmt: skip


@triton.jit
def product_tile(
    x, dy, beta, rank, first_m, first_n, m, n, in_m, in_n, stride_xr, stride_xk, stride_dr,
    stride_dn, stride_beta, WIDE: tl.constexpr, FACTOR: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return a tile of dyᵀ diag(beta) x, or of dyᵀ x without ``beta``, in WIDE.

    FACTOR: type that the factors are multiplied in; TERMS: how many of it dy·beta is made of.
    """
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((m.shape[0], n.shape[0]), dtype=WIDE)
    # Where a tile begins is a number of 64 bits; within it 32 bits do, and save registers.
    d_tile = dy + first_m.to(tl.int64) * stride_dn
    x_tile = x + first_n.to(tl.int64) * stride_xk
    for first_r in range(0, rank, BLOCK_R):
        in_r = first_r + r < rank
        ds = tl.load(
            d_tile + (r[:, None] * stride_dr + m[None, :] * stride_dn),
            mask=in_r[:, None] & in_m[None, :], other=0.0,
        )  # fmt: skip
        xs = tl.load(
            x_tile + (r[:, None] * stride_xr + n[None, :] * stride_xk),
            mask=in_r[:, None] & in_n[None, :], other=0.0,
        ).to(FACTOR)  # fmt: skip
        if beta is not None:
            factor = tl.load(beta + (first_r + r) * stride_beta, mask=in_r, other=0.0).to(WIDE)
            ds = ds.to(WIDE) * factor[:, None]
        left = tl.trans(ds)
        if TERMS == 1:
            left = left.to(FACTOR)
            total = tl.dot(left, xs, total, input_precision=PRECISION, out_dtype=WIDE)
        else:
            high, low = two_terms(left, FACTOR)
            total = tl.dot(high, xs, total, input_precision=PRECISION, out_dtype=WIDE)
            total = tl.dot(low, xs, total, input_precision=PRECISION, out_dtype=WIDE)
        d_tile += BLOCK_R * stride_dr
        x_tile += BLOCK_R * stride_xr
    return total


@triton.jit
def first_of_tile(out, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column with which this program's tile begins, in an order that shares reads."""
    tiles_m, tiles_n = tl.cdiv(out, BLOCK_M), tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, GROUP_M)
    return tile_m * BLOCK_M, tile_n * BLOCK_N


@triton.jit
def tile_pointers(
    matrix, first_m, first_n, m, n, group_rows, stride_g, stride_r, stride_k, GROUPED: tl.constexpr
):
    """Pointers to a tile of a matrix, whose rows may come in groups of ``group_rows``."""
    if GROUPED:
        row = first_m.to(tl.int64) + m
        rows = row // group_rows * stride_g + row % group_rows * stride_r
        return matrix + rows[:, None] + (first_n + n).to(tl.int64)[None, :] * stride_k
    else:
        tile = matrix + first_m.to(tl.int64) * stride_r + first_n.to(tl.int64) * stride_k
        return tile + m[:, None] * stride_r + n[None, :] * stride_k


@triton.jit(do_not_specialize=["rank", "seed_key", "stride_beta"])
def rank_update_kernel(
    weight, x, dy, beta, scale_at, scale: tl.float64, seed_key: tl.int64, rank, out, width,
    group_rows, stride_wg, stride_wr, stride_wk, stride_xr, stride_xk, stride_dr, stride_dn,
    stride_beta,
    GROUPED: tl.constexpr, STOCHASTIC: tl.constexpr, FACTOR: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of the weight."""
    first_m, first_n = first_of_tile(out, width, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_m, in_n = first_m + m < out, first_n + n < width
    wide: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    total = product_tile(
        x, dy, beta, rank, first_m, first_n, m, n, in_m, in_n, stride_xr, stride_xk, stride_dr,
        stride_dn, stride_beta, wide, FACTOR, TERMS, PRECISION, BLOCK_R,
    )  # fmt: skip
    place = tile_pointers(
        weight, first_m, first_n, m, n, group_rows, stride_wg, stride_wr, stride_wk, GROUPED
    )
    mask = in_m[:, None] & in_n[None, :]
    if scale_at is None:
        scaling = tl.full((), scale, tl.float64).to(wide)
    else:
        scaling = tl.load(scale_at).to(wide)
    target = scaling * tl.load(place, mask=mask, other=0.0).to(wide) + total
    if STOCHASTIC:
        key = random_key(seed_key, tl.full((), 0, tl.int64))
        row = first_m.to(tl.int64) + m
        bits = random_bits(key, row[:, None] * width + (first_n + n)[None, :])
        tl.store(place, round_stochastic(target, bits, weight.dtype.element_ty), mask=mask)
    else:
        tl.store(place, target.to(weight.dtype.element_ty), mask=mask)


def launch_options(tiles: Tiles) -> dict[str, int]:
    """As a launch takes them."""
    return {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _constants(product: torch.dtype, tiles: Tiles, stochastic: bool) -> dict[str, Any]:
    """TF32 is for operands that fit it: float16, and its two terms."""
    half = product == torch.float16
    return {
        "STOCHASTIC": stochastic, "FACTOR": TRITON_DTYPES[torch.float32 if half else product],
        "TERMS": 2 if product in (torch.bfloat16, torch.float16) else 1,
        "PRECISION": "tf32" if half else "ieee",
        "BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_R": tiles.depth, "GROUP_M": GROUP,
    }  # fmt: skip


def rank_update_launch(
    weight: Tensor,
    x: Tensor,
    dy: Tensor,
    beta: Tensor,
    *,
    scale: float | Tensor = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """See :func:`ttt_fast.ops.rank_update_`, which checks the arguments.

    ``scale`` may be a tensor of one element on the device, too.
    """
    if weight.numel() == 0:
        return
    if weight.dim() == 3 and len(weight) == 1:
        weight = weight[0]
    rank, (out, width) = len(beta), (dy.shape[1], x.shape[1])
    # Of two types, or a wider one than the weight's: in what holds both.
    product = x.dtype if x.dtype == dy.dtype else torch.promote_types(x.dtype, dy.dtype)
    small, large = TILES[product]
    many = triton.cdiv(out, large.rows) * triton.cdiv(width, large.columns) >= MANY_TILES
    tiles = large if many else small
    scale_at, scale = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    stochastic = rounding == "stochastic" and weight.dtype in (torch.bfloat16, torch.float16)
    grouped = weight.dim() == 3
    stride_wg, stride_wr, stride_wk = weight.stride() if grouped else (0, *weight.stride())
    rank_update_kernel[(triton.cdiv(out, tiles.rows) * triton.cdiv(width, tiles.columns),)](
        weight, x, dy, beta, scale_at, float(scale), seed_key(seed), rank, out, width,
        weight.shape[1] if grouped else 0, stride_wg, stride_wr, stride_wk, *x.stride(),
        *dy.stride(), beta.stride(0),
        GROUPED=grouped, **_constants(product, tiles, stochastic), **launch_options(tiles),
        enable_fp_fusion=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------- machine code


def _case(
    dtype: torch.dtype, size: int, *, stochastic: bool = False, by_columns: bool = False
) -> Case:
    tiles = TILES[dtype][size]
    storage = pointer_to(dtype)
    pointers = dict.fromkeys(("weight", "x", "dy"), storage)
    pointers["beta"] = pointer_to(compute_dtype(dtype))
    unit, stride = ("stride_wr", "stride_wk")[:: 1 if by_columns else -1]
    sizes = ("out", "width", "group_rows", "stride_wg", stride, "stride_xr", "stride_dr")
    numbers = {"scale": "fp64", "seed_key": "i64", "rank": "i32", "stride_beta": "i32"}
    constants = {"scale_at": None, unit: 1, "stride_xk": 1, "stride_dn": 1, "GROUPED": False}
    words = (storage[1:], f"{tiles.rows} x {tiles.columns}", "stochastic" * stochastic,
             "W by columns" * by_columns)  # fmt: skip
    return Case(
        ", ".join(filter(None, words)), rank_update_kernel,
        pointers | numbers | dict.fromkeys(sizes, "i32"),
        constants | _constants(dtype, tiles, stochastic), **launch_options(tiles),
        divisible=(*pointers, *sizes), dot=dtype != torch.float32,
    )  # fmt: skip


CASES = [
    _case(torch.bfloat16, 0),
    _case(torch.bfloat16, 1),
    _case(torch.bfloat16, 1, stochastic=True),
    _case(torch.bfloat16, 1, by_columns=True),
    _case(torch.float16, 0, stochastic=True),
    _case(torch.float16, 1),
    _case(torch.float32, 1),
    _case(torch.float64, 1),
]
