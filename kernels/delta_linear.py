"""y = ρ·x Wᵀ − ((x aᵀ) ∘ β) d  for a batch of deltas that share W; the input's gradient likewise.

Fused: base product, its scaling by ρ, the deltas, the one rounding at the end, and a copy of x for
the factors of steps to come. Two launches: the
scores h = −(x aᵀ) ∘ β, which every column of y needs whole, then y, where the sums of ρ·x Wᵀ and
h d meet in float32. Nothing is rounded to the storage type but y. Scores go to the tensor cores as
two terms (two_terms.py): bfloat16 keeps 16 bits of them, float16 22. A delta of 1e-3 of y in
bfloat16 is then as near to float64, before y is rounded, as by the formula in float32 (9e-5 of its
norm; 2e-3 with scores in bfloat16). float32 multiplies without tensor cores (IEEE), float64 in
float64.

A tile has rows of several deltas where one has fewer tokens than a tile has rows, so that prompts
of 20 tokens read W together. The rows of a delta are chosen after its product, not masked with
zeros within it: a NaN in one delta's factors stays there.

Bytes, computed: W, a and d once from memory (d again from cache where the scores are split), x
three times, y and the copy once, the scores 4 bytes an entry (8 in float16), written and read.
Bound, from peak rates: memory below 160 rows on an A100, 290 on an H100; there tiles of 32 columns
keep enough loads under way on all multiprocessors without dividing the sum over the inputs. Above,
arithmetic. The rank is a run-time value that nothing is specialised on: all steps share one kernel.

Reference: delta_linear in ttt_fast/factor_reference.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import pointer_to
from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.two_terms import two_terms
from ttt_fast.rounding import compute_dtype

# Rows of scores are padded to a multiple of it: of every tile's columns and depth.
RANK_PADDING = 128
# A launch of scores has at least so many programs while there is input to divide among them: at the
# first steps the rank is a single tile, and one program would read all of a and x by itself.
SCORE_PROGRAMS = 8


class Tiles(NamedTuple):
    """How a product is cut up.

    Attributes:
        rows: of a tile of y, or of the scores.
        columns: of the same.
        depth: inputs that are summed in one turn of the loop.
        rank_depth: ranks that are.
        num_warps: launch option.
        num_stages: turns whose loads are under way at a time.
    """

    rows: int
    columns: int
    depth: int
    rank_depth: int
    num_warps: int
    num_stages: int


# Few rows: narrow tiles, that is, many programs and loads under way. Many: square ones. Rank depths
# of 16 are where 32 would take more registers than sm_80 has.
TILES = {
    torch.bfloat16: (
        Tiles(32, 32, 128, 32, 4, 4), Tiles(64, 32, 128, 32, 4, 4), Tiles(128, 64, 64, 32, 8, 4),
        Tiles(128, 128, 64, 16, 8, 3),
    ),
    torch.float16: (
        Tiles(32, 32, 128, 32, 4, 4), Tiles(64, 32, 128, 32, 4, 4), Tiles(128, 64, 64, 16, 8, 3),
    ),
    # Without tensor cores a product is an instruction of every thread, and the loop is unrolled.
    torch.float32: (Tiles(32, 32, 32, 32, 4, 3), Tiles(64, 64, 16, 16, 4, 3)),
    torch.float64: (Tiles(16, 32, 16, 16, 4, 2), Tiles(32, 32, 16, 16, 4, 2)),
}  # fmt: skip
# Type that scores are stored in, and of how many terms they are the sum.
SCORES = {
    torch.bfloat16: (torch.bfloat16, 2), torch.float16: (torch.float32, 2),
    torch.float32: (torch.float32, 1), torch.float64: (torch.float64, 1),
}  # fmt: skip


def tiles_for(rows: int, dtype: torch.dtype) -> Tiles:
    """The smallest tiles that have room for all rows; wide ones from the third row of tiles on."""
    *narrow, widest = TILES[dtype]
    last = narrow[-1]
    return next((t for t in narrow if rows <= t.rows), last if rows <= 2 * last.rows else widest)


def _options(tiles: Tiles) -> dict[str, int]:
    return {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _constants(dtype: torch.dtype) -> dict[str, Any]:
    """What both kernels are told; TF32 is for operands that fit it, as float16 and its scores."""
    precision = "tf32" if dtype == torch.float16 else "ieee"
    return {"PADDING": RANK_PADDING, "TERMS": SCORES[dtype][1], "PRECISION": precision}


def _score_constants(tiles: Tiles, dtype: torch.dtype) -> dict[str, Any]:
    sizes = {"BLOCK_M": tiles.rows, "BLOCK_R": tiles.columns, "BLOCK_K": tiles.depth}
    return sizes | _constants(dtype)


def _product_constants(tiles: Tiles, dtype: torch.dtype) -> dict[str, Any]:
    sizes = {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_K": tiles.depth}
    return sizes | {"BLOCK_R": tiles.rank_depth} | _constants(dtype)


# What changes from step to step, or with the prompt, must not compile a kernel anew.
@triton.jit(do_not_specialize=["tokens", "rank", "splits", "stride_bb"])
def scores_kernel(
    x, a, beta, h, tokens, width, rank, splits, stride_ab, stride_ar, stride_bb,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PADDING: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores h (TERMS, splits, B·M, padded) = −(x aᵀ) ∘ β: a tile, of a part of the sum."""
    delta = tl.program_id(2).to(tl.int64)
    first_m, first_r = tl.program_id(1) * BLOCK_M, tl.program_id(0) // splits * BLOCK_R
    split = tl.program_id(0) % splits
    m, r, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    in_m, in_r = first_m + m < tokens, first_r + r < rank
    # Where a tile begins is a number of 64 bits; within it 32 bits do, and save registers.
    first_row = delta * tokens + first_m
    span = tl.cdiv(tl.cdiv(width, BLOCK_K), splits) * BLOCK_K
    x_tile = x + first_row * width
    a_tile = a + delta * stride_ab + first_r.to(tl.int64) * stride_ar

    wide = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=wide)
    for start in range(split * span, min((split + 1) * span, width), BLOCK_K):
        in_k = start + k < width
        xs = tl.load(
            x_tile + start + (m[:, None] * width + k[None, :]),
            mask=in_m[:, None] & in_k[None, :], other=0.0,
        )  # fmt: skip
        rows = tl.load(
            a_tile + start + (r[None, :] * stride_ar + k[:, None]),
            mask=in_r[None, :] & in_k[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(xs, rows, total, input_precision=PRECISION, out_dtype=wide)

    factor = tl.load(beta + delta * stride_bb + first_r + r, mask=in_r, other=0.0).to(wide)
    total *= -factor[None, :]
    padded = tl.cdiv(rank, PADDING) * PADDING
    all_rows = tl.num_programs(2).to(tl.int64) * tokens
    h_tile = h + (split * all_rows + first_row) * padded + first_r
    place = m[:, None] * padded + r[None, :]
    if TERMS == 1:
        tl.store(h_tile + place, total, mask=in_m[:, None])
    else:
        high, low = two_terms(total, h.dtype.element_ty)
        tl.store(h_tile + place, high, mask=in_m[:, None])
        tl.store(h_tile + splits * all_rows * padded + place, low, mask=in_m[:, None])


@triton.jit(do_not_specialize=["rows", "tokens", "rank", "splits"])
def delta_linear_kernel(
    x, weight, d, h, rho, y, append, rows, tokens, width, out, rank, splits, stride_wn, stride_wk,
    stride_db, stride_dr, stride_pb, stride_pr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PADDING: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y: ρ·x Wᵀ, then h d of each delta that has rows in the tile; a share of x."""
    first_m, first_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = first_m + m < rows, first_n + n < out
    delta = (first_m + m) // tokens

    wide = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    x_tile = x + first_m.to(tl.int64) * width
    if append is not None:
        token = (first_m + m) % tokens
        kept = append + (delta.to(tl.int64) * stride_pb + token.to(tl.int64) * stride_pr)
        # The tiles of these rows take turns: one alone would be late.
        for start in range(tl.program_id(1) * BLOCK_K, width, tl.num_programs(1) * BLOCK_K):
            inside = in_m[:, None] & (start + k < width)[None, :]
            xs = tl.load(x_tile + start + (m[:, None] * width + k[None, :]), mask=inside)
            tl.store(kept[:, None] + (start + k)[None, :], xs, mask=inside)
    if weight is not None:
        w_tile = weight + first_n.to(tl.int64) * stride_wn
        for start in range(0, width, BLOCK_K):
            in_k = start + k < width
            xs = tl.load(
                x_tile + start + (m[:, None] * width + k[None, :]),
                mask=in_m[:, None] & in_k[None, :], other=0.0,
            )  # fmt: skip
            ws = tl.load(
                w_tile + (k[:, None] * stride_wk + n[None, :] * stride_wn),
                mask=in_k[:, None] & in_n[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(xs, ws, total, input_precision=PRECISION, out_dtype=wide)
            w_tile += stride_wk * BLOCK_K
        if rho is not None:
            total *= tl.load(rho + delta, mask=in_m, other=0.0).to(wide)[:, None]

    padded = tl.cdiv(rank, PADDING) * PADDING
    plane = splits * rows.to(tl.int64) * padded
    turns = splits * tl.cdiv(rank, BLOCK_R)
    # A division by zero must not even be there to be hoisted out of a loop that runs no time.
    blocks = tl.maximum(tl.cdiv(rank, BLOCK_R), 1)
    r = tl.arange(0, BLOCK_R)
    d_delta = d + (first_m // tokens).to(tl.int64) * stride_db + first_n
    for b in range(first_m // tokens, (min(first_m + BLOCK_M, rows) - 1) // tokens + 1):
        mine = delta == b
        part = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
        # The parts of a score are so many more terms of this sum: a loop of their own within this
        # one would keep its loads from running ahead.
        for turn in range(0, turns):
            first_r = turn % blocks * BLOCK_R
            h_tile = h + (turn // blocks * rows.to(tl.int64) + first_m) * padded + first_r
            d_tile = d_delta + first_r.to(tl.int64) * stride_dr
            place = m[:, None] * padded + r[None, :]
            ds = tl.load(
                d_tile + (r[:, None] * stride_dr + n[None, :]),
                mask=(first_r + r < rank)[:, None] & in_n[None, :], other=0.0,
            ).to(h.dtype.element_ty)  # fmt: skip
            hs = tl.load(h_tile + place, mask=mine[:, None], other=0.0)
            part = tl.dot(hs, ds, part, input_precision=PRECISION, out_dtype=wide)
            if TERMS == 2:
                hs = tl.load(h_tile + plane + place, mask=mine[:, None], other=0.0)
                part = tl.dot(hs, ds, part, input_precision=PRECISION, out_dtype=wide)
        total = tl.where(mine[:, None], total + part, total)
        d_delta += stride_db
    tl.store(
        y + first_m.to(tl.int64) * out + first_n + (m[:, None] * out + n[None, :]),
        total.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :],
    )  # fmt: skip


def delta_linear_launch(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    d: Tensor,
    beta: Tensor,
    rho: Tensor | None = None,
    append: Tensor | None = None,
) -> Tensor:
    """See :func:`ttt_fast.ops.delta_linear`, which checks the arguments.

    Copies a, d and beta where their last dimension is strided, x and rho where any is.
    """
    batch, tokens, width = x.shape
    rank, out = a.shape[1], d.shape[2]
    y = x.new_empty(batch, tokens, out)
    if y.numel() == 0:
        if append is not None:
            append.copy_(x)
        return y
    x = x.contiguous()
    a, d, beta = (t if t.stride(-1) == 1 else t.contiguous() for t in (a, d, beta))
    rho = None if rho is None else rho.contiguous()
    rows = batch * tokens
    score_dtype, terms = SCORES[x.dtype]

    tiles = tiles_for(tokens, x.dtype)
    grid = triton.cdiv(rank, tiles.columns), triton.cdiv(tokens, tiles.rows), batch
    programs = max(1, grid[0] * grid[1] * grid[2])
    splits = max(1, min(SCORE_PROGRAMS // programs, triton.cdiv(width, tiles.depth)))
    padded = triton.cdiv(rank, RANK_PADDING) * RANK_PADDING
    h = x.new_empty(terms * splits * rows * padded, dtype=score_dtype)
    if rank > 0:
        scores_kernel[grid[0] * splits, grid[1], grid[2]](
            x, a, beta, h, tokens, width, rank, splits, a.stride(0), a.stride(1), beta.stride(0),
            **_score_constants(tiles, x.dtype), **_options(tiles), enable_fp_fusion=False,
        )  # fmt: skip

    tiles = tiles_for(rows, x.dtype)
    stride_wn, stride_wk = (0, 0) if weight is None else weight.stride()
    stride_pb, stride_pr = (0, 0) if append is None else append.stride()[:2]
    # Tiles of the same columns one after the other: they find W in the cache.
    delta_linear_kernel[triton.cdiv(rows, tiles.rows), triton.cdiv(out, tiles.columns)](
        x, weight, d, h, rho, y, append, rows, tokens, width, out, rank, splits, stride_wn,
        stride_wk, d.stride(0), d.stride(1), stride_pb, stride_pr,
        **_product_constants(tiles, x.dtype), **_options(tiles), enable_fp_fusion=False,
    )  # fmt: skip
    return y


# ---------------------------------------------------------------------------- machine code


def _types(dtype: torch.dtype) -> tuple[str, str, str]:
    """Pointers to storage, to scores, to coefficients."""
    return pointer_to(dtype), pointer_to(SCORES[dtype][0]), pointer_to(compute_dtype(dtype))


def _score_case(dtype: torch.dtype, tiles: Tiles) -> Case:
    storage, score, wide = _types(dtype)
    sizes = ("tokens", "width", "rank", "splits", "stride_ab", "stride_ar", "stride_bb")
    return Case(
        f"{storage[1:]}, scores, {tiles.rows} x {tiles.columns}", scores_kernel,
        {"x": storage, "a": storage, "beta": wide, "h": score} | dict.fromkeys(sizes, "i32"),
        _score_constants(tiles, dtype), **_options(tiles),
        divisible=("x", "a", "beta", "h", "width", "stride_ab", "stride_ar"),
        dot=dtype != torch.float32,
    )  # fmt: skip


def _product_case(
    dtype: torch.dtype, tiles: Tiles, *, by_columns: bool = False, append: bool = True
) -> Case:
    storage, score, wide = _types(dtype)
    names = ("x", "weight", "d", "y", "append")[: None if append else -1]
    tensors = dict.fromkeys(names, storage) | {"h": score, "rho": wide}
    unit, stride = ("stride_wn", "stride_wk")[:: 1 if by_columns else -1]
    strides = ("width", "out", stride, "stride_db", "stride_dr", "stride_pb", "stride_pr")
    sizes = (*strides, "rows", "tokens", "rank", "splits")
    words = (
        storage[1:], f"{tiles.rows} x {tiles.columns}", "W by columns" * by_columns,
        "x not kept" * (not append),
    )  # fmt: skip
    constants = _product_constants(tiles, dtype) | {unit: 1}
    return Case(
        ", ".join(filter(None, words)), delta_linear_kernel, tensors | dict.fromkeys(sizes, "i32"),
        constants if append else constants | {"append": None},
        **_options(tiles), divisible=(*tensors, *strides), dot=dtype != torch.float32,
    )  # fmt: skip


CASES = [
    _score_case(torch.bfloat16, TILES[torch.bfloat16][0]),
    _score_case(torch.bfloat16, TILES[torch.bfloat16][-1]),
    *(_product_case(torch.bfloat16, tiles) for tiles in TILES[torch.bfloat16]),
    _product_case(torch.bfloat16, TILES[torch.bfloat16][-1], by_columns=True),
    _product_case(torch.bfloat16, TILES[torch.bfloat16][0], append=False),
    _score_case(torch.float16, TILES[torch.float16][-1]),
    _product_case(torch.float16, TILES[torch.float16][-1]),
    _score_case(torch.float32, TILES[torch.float32][-1]),
    _product_case(torch.float32, TILES[torch.float32][-1]),
    _product_case(torch.float64, TILES[torch.float64][-1]),
]
