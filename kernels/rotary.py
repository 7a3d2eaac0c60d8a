"""Rotary positions of the heads of tokens, y = x ∘ cos + rotate_half(x) ∘ sin, or the transpose.

Fused: both products, their roundings, the sum; stock torch writes five tensors. A program takes
some heads of one token, whose cosines and sines are loaded once for all of them.

Bytes per element: one read and one write, 4 in 16 bits and 8 in float32, beside the angles, which
the heads share: each thread's loads of them, from the L1 cache, are in the numbers of the cases.
Bound: memory bandwidth, or the launch itself where tokens are few. Halves that are no multiple of
16 bytes are accessed in smaller pieces.
Reference: rotary in ttt_fast/layer_reference.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import pointer_to
from ttt_fast.kernels.machine_code import Case
from ttt_fast.rounding import compute_dtype

# Pairs of columns of a program at most: 8 for each thread of 4 warps, one access in 16 bits.
MOST_PAIRS = 1024
PAIRS_PER_WARP = 256
MOST_WARPS = 4


class Tile(NamedTuple):
    """What a program takes: some heads of a token.

    Attributes:
        heads: a power of two.
        half: of the columns that are turned.
        width: of a head.
        num_warps: launch option.
    """

    heads: int
    half: int
    width: int
    num_warps: int

    @property
    def block(self) -> int:
        """Columns of half a tile, a power of two."""
        return triton.next_power_of_2(max(1, self.half))

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments of the kernel: all are those of a model."""
        rest = self.width - 2 * self.half
        return {
            "HEADS": self.heads, "HALF": self.half, "WIDTH": self.width, "BLOCK": self.block,
            "REST": triton.next_power_of_2(rest) if rest else 0,
        }  # fmt: skip


def tile_for(heads: int, turned: int, width: int) -> Tile:
    """Tile for tokens with heads of a width."""
    tile = Tile(1, turned // 2, width, 1)
    taken = min(triton.next_power_of_2(heads), max(1, MOST_PAIRS // tile.block))
    num_warps = min(max(1, taken * tile.block // PAIRS_PER_WARP), MOST_WARPS)
    return tile._replace(heads=taken, num_warps=num_warps)


# ---------------------------------------------------------------------------- kernel


@triton.jit
def rounded(values, ANGLE: tl.constexpr):
    """Products as the type of the angles has them."""
    return values.to(ANGLE).to(values.dtype)


# Strides are those of a model's projections, and whether they are multiples of 16 decides the width
# of accesses.
@triton.jit(do_not_specialize=["heads"])
def rotary_kernel(
    x,  # (B, H, T, D) by strides
    cos,  # (B or 1, T, R) by strides, as sin
    sin,
    y,  # as x
    heads,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """HEADS heads of one token."""
    STORED: tl.constexpr = x.dtype.element_ty
    ANGLE: tl.constexpr = cos.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if STORED == tl.float64 else tl.float32
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * HEADS
    # In 64 bits: heads are far apart where tokens are many and lie between them.
    rows, columns = tl.arange(0, HEADS).to(tl.int64), tl.arange(0, BLOCK)
    in_rows, in_half = first + rows < heads, columns < HALF
    x += batch * x_batch + token * x_token + first * x_head
    y += batch * y_batch + token * y_token + first * y_head
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token

    cos1 = tl.load(cos + columns, mask=in_half, other=0.0).to(WIDE)
    cos2 = tl.load(cos + HALF + columns, mask=in_half, other=0.0).to(WIDE)
    sin1 = tl.load(sin + columns, mask=in_half, other=0.0).to(WIDE)
    sin2 = tl.load(sin + HALF + columns, mask=in_half, other=0.0).to(WIDE)
    if TRANSPOSED:
        sin1, sin2 = -sin2, -sin1
    mask = in_rows[:, None] & in_half[None, :]
    place = rows[:, None] * x_head + columns[None, :]
    a = tl.load(x + place, mask=mask, other=0.0).to(WIDE)
    b = tl.load(x + HALF + place, mask=mask, other=0.0).to(WIDE)
    y1 = rounded(a * cos1[None, :], ANGLE) - rounded(b * sin1[None, :], ANGLE)
    y2 = rounded(b * cos2[None, :], ANGLE) + rounded(a * sin2[None, :], ANGLE)
    place = rows[:, None] * y_head + columns[None, :]
    tl.store(y + place, y1.to(STORED), mask=mask)
    tl.store(y + HALF + place, y2.to(STORED), mask=mask)
    if REST > 0:
        columns = 2 * HALF + tl.arange(0, REST)
        mask = in_rows[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(x + rows[:, None] * x_head + columns[None, :], mask=mask)
        tl.store(y + rows[:, None] * y_head + columns[None, :], values, mask=mask)


# ---------------------------------------------------------------------------- launch


def rotary_launch(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool = False) -> Tensor:
    """See :func:`ttt_fast.ops.rotary`, which checks the arguments."""
    batch, heads, tokens, width = x.shape
    turned = cos.shape[-1]
    y = torch.empty_like(x)
    if y.numel() > 0:
        tile = tile_for(heads, turned, width)
        angles = [t.stride(d) if t.shape[d] > 1 else 0 for t in (cos, sin) for d in (0, 1)]
        rotary_kernel[(tokens, triton.cdiv(heads, tile.heads), batch)](
            x, cos, sin, y, heads, *x.stride()[:3], *y.stride()[:3], *angles,
            TRANSPOSED=transposed, **tile.constants, num_warps=tile.num_warps, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return y


# ---------------------------------------------------------------------------- machine code


def _case(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    bytes_per_element: float | None = None,
    *,
    wide: bool = False,
    transposed: bool = False,
) -> Case:
    """A case of heads, turned columns and width."""
    heads, turned, width = shape
    tile = tile_for(heads, turned, width)
    angle = pointer_to(compute_dtype(dtype) if wide else dtype)
    pointers = {"x": pointer_to(dtype), "cos": angle, "sin": angle, "y": pointer_to(dtype)}
    strides = [f"{name}_{axis}" for name in "xy" for axis in ("batch", "head", "token")]
    angle_strides = [f"{name}_{axis}" for name in ("cos", "sin") for axis in ("batch", "token")]
    numbers = dict.fromkeys(("heads", *strides, *angle_strides), "i32")
    name = f"{str(dtype).removeprefix('torch.')}, {heads} x {width}"
    name += f", {turned} turned" * (turned < width) + ", wide angles" * wide
    return Case(
        name + ", transposed" * transposed, rotary_kernel, pointers | numbers,
        tile.constants | {"TRANSPOSED": transposed}, tile.num_warps,
        divisible=(*pointers, *strides, *(angle_strides if turned % 16 == 0 else ())),
        bytes_per_element=bytes_per_element,
        block=None if bytes_per_element is None else 2 * tile.heads * tile.block,
    )  # fmt: skip


CASES = [
    _case(torch.bfloat16, (32, 128, 128), 8),
    _case(torch.bfloat16, (32, 128, 128), 8, transposed=True),
    _case(torch.bfloat16, (32, 128, 128), 12, wide=True),
    _case(torch.bfloat16, (9, 64, 64), 8),
    _case(torch.bfloat16, (16, 16, 64)),
    _case(torch.bfloat16, (32, 24, 96)),
    _case(torch.float16, (32, 128, 128), 8),
    _case(torch.float32, (32, 128, 128), 12),
    _case(torch.float64, (32, 128, 128), 20),
]
