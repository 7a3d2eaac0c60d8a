"""SGD on weights whose gradients are products, dyᵀ x, that are formed nowhere in memory.

Fused: the product, clip factor, decay, momentum, Nesterov, the step, rounding, update_landed: what
sgd.py does to a gradient from memory is done to a tile of the product, whose sums are in float32,
where it lies in registers. One launch for each weight, two more for update_landed.

Bytes moved for each element of a weight, computed: 8 in bfloat16 with momentum (read and write w
and m), 4 without; 16 and 8 in float32. Formed first, the gradient would be written and read, 4 and
8 bytes more. And x and dy once for each row or column of tiles that reads them, from cache where
they fit it. Bound: memory on short prompts, arithmetic on long ones (rank_update.py has numbers).

Reference: rank_sgd_ in ttt_fast/reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import TRITON_DTYPES, pointer_to
from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.rank_update import (
    GROUP,
    Tiles,
    first_of_tile,
    launch_options,
    product_tile,
    tile_pointers,
)
from ttt_fast.kernels.rounding import random_bits, random_key, round_stochastic, seed_key
from ttt_fast.kernels.sgd import decay_kind, decayed_gradient, new_momentum, sgd_step
from ttt_fast.kernels.update import add_landed, live_numel, scale_gradient

# Weight and momentum come into registers beside the sums, so tiles are smaller than those of
# rank_update.py. What is bound by memory gains more from more resident threads than from reading
# the factors, which are in the cache, less often: 128 x 64 took twice the registers.
# Of three stages the smallest case spills on sm_80.
_HALF = Tiles(64, 64, 32, 8, 2)
TILES = {
    torch.bfloat16: _HALF,
    torch.float16: _HALF,
    torch.float32: Tiles(64, 64, 16, 8, 3),
    torch.float64: Tiles(32, 32, 16, 4, 2),
}


@triton.jit(
    do_not_specialize=["rank", "seed_key", "tensor"],
    # A slot of a ring has any alignment.
    do_not_specialize_on_alignment=["grad_norm", "found_inf", "landed_sums"],
)
def rank_sgd_kernel(
    weight, buffer, x, dy, grad_norm, found_inf, landed_sums, seed_key: tl.int64, tensor, rank, out,
    width, group_rows, stride_wg, stride_wr, stride_wk, stride_bg, stride_br, stride_bk, stride_xr,
    stride_xk, stride_dr, stride_dn, max_grad_norm: tl.float64, momentum: tl.float64,
    keep: tl.float64, weight_decay: tl.float64, minus_lr: tl.float64, lr_weight_decay: tl.float64,
    GROUPED: tl.constexpr, CLIP: tl.constexpr, DECAY: tl.constexpr, NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr, STOCHASTIC: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of a weight. ``buffer`` is None without momentum."""
    first_m, first_n = first_of_tile(out, width, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_m, in_n = first_m + m < live_numel(out, found_inf), first_n + n < width
    COMPUTE: tl.constexpr = tl.float64 if weight.dtype.element_ty == tl.float64 else tl.float32
    total = product_tile(
        x, dy, None, rank, first_m, first_n, m, n, in_m, in_n, stride_xr, stride_xk, stride_dr,
        stride_dn, 0, COMPUTE, FACTOR, 1, PRECISION, BLOCK_R,
    )  # fmt: skip

    mask = in_m[:, None] & in_n[None, :]
    place = tile_pointers(
        weight, first_m, first_n, m, n, group_rows, stride_wg, stride_wr, stride_wk, GROUPED
    )
    before = tl.load(place, mask=mask, other=0.0)
    g = scale_gradient(total, grad_norm, max_grad_norm, None, CLIP, False)
    old = before.to(COMPUTE)
    g = decayed_gradient(g, old, weight_decay, COMPUTE, DECAY)
    velocity = g
    if buffer is not None:
        own = tile_pointers(
            buffer, first_m, first_n, m, n, group_rows, stride_bg, stride_br, stride_bk, GROUPED
        )
        if not FIRST_STEP:
            velocity = tl.load(own, mask=mask, other=0.0).to(COMPUTE)
            velocity = new_momentum(g, velocity, momentum, keep, COMPUTE)
        tl.store(own, velocity.to(buffer.dtype.element_ty), mask=mask)
    step = sgd_step(
        g, velocity, old, momentum, minus_lr, lr_weight_decay, COMPUTE, buffer is not None, DECAY,
        NESTEROV,
    )  # fmt: skip
    target = old + step
    if STOCHASTIC:
        row = first_m.to(tl.int64) + m
        bits = random_bits(
            random_key(seed_key, tensor.to(tl.int64)), row[:, None] * width + (first_n + n)[None, :]
        )
        after = round_stochastic(target, bits, weight.dtype.element_ty)
    else:
        after = target.to(weight.dtype.element_ty)
    if landed_sums is not None:
        wide = tl.where(mask, step, 0.0).to(tl.float64)
        moved = after.to(tl.float64) - before.to(tl.float64)
        tile = tl.program_id(0)
        tl.store(landed_sums + 2 * tile, tl.sum(moved * wide))
        tl.store(landed_sums + 2 * tile + 1, tl.sum(wide * wide))
    tl.store(place, after, mask=mask)


def _constants(product: torch.dtype, tiles: Tiles, stochastic: bool) -> dict[str, Any]:
    return {
        "STOCHASTIC": stochastic, "FACTOR": TRITON_DTYPES[product], "PRECISION": "ieee",
        "BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_R": tiles.depth, "GROUP_M": GROUP,
    }  # fmt: skip


def rank_sgd_launch(
    params: Sequence[Tensor],
    xs: Sequence[Tensor],
    dys: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    grad_norm: Tensor | None = None,
    found_inf: Tensor | None = None,
    landed: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    first_step: bool = False,
    max_grad_norm: float = -1.0,
    rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """See :func:`ttt_fast.ops.rank_sgd_`, which checks the arguments."""
    programs = [_programs(x, dy) for x, dy in zip(xs, dys, strict=True)]
    if sum(programs) == 0:
        return
    device, sums = params[0].device, None
    if landed is not None:
        sums = torch.empty(sum(programs), 2, dtype=torch.float64, device=device)
    grad_norm, found_inf = (None if t is None else t.to(device) for t in (grad_norm, found_inf))
    begin = 0
    for i, (param, x, dy, count) in enumerate(zip(params, xs, dys, programs, strict=True)):
        if count == 0:
            continue
        tiles = TILES[x.dtype]
        buffer = momentum_buffers[i] if momentum else None
        stochastic = rounding == "stochastic" and param.itemsize == 2
        rank_sgd_kernel[(count,)](
            param, buffer, x, dy, grad_norm, found_inf,
            None if sums is None else sums[begin : begin + count], seed_key(seed), i, len(x),
            dy.shape[1], x.shape[1], param.shape[1] if param.dim() == 3 else 0, *_strides(param),
            *((0, 0, 0) if buffer is None else _strides(buffer)), *x.stride(), *dy.stride(),
            max_grad_norm, momentum, 1.0 - dampening, weight_decay, -lr, lr * weight_decay,
            GROUPED=param.dim() == 3, CLIP=grad_norm is not None and max_grad_norm >= 0,
            DECAY=decay_kind(weight_decay, decoupled_weight_decay), NESTEROV=nesterov,
            FIRST_STEP=first_step,
            **_constants(x.dtype, tiles, stochastic), **launch_options(tiles),
            enable_fp_fusion=False,
        )  # fmt: skip
        begin += count
    if landed is not None:
        add_landed(sums, landed)


def _programs(x: Tensor, dy: Tensor) -> int:
    """Tiles of a weight."""
    tiles = TILES[x.dtype]
    return triton.cdiv(dy.shape[1], tiles.rows) * triton.cdiv(x.shape[1], tiles.columns)


def _strides(matrix: Tensor) -> tuple[int, ...]:
    """Between groups of rows (0 where there are none), rows and columns."""
    return matrix.stride() if matrix.dim() == 3 else (0, *matrix.stride())


# ---------------------------------------------------------------------------- machine code


def _case(
    dtype: torch.dtype, *, momentum: bool = True, landed: bool = True, stochastic: bool = False
) -> Case:
    tiles = TILES[dtype]
    pointers = dict.fromkeys(("weight", "x", "dy"), pointer_to(dtype))
    loose = {"grad_norm": "*fp32", "found_inf": "*fp32"}
    constants = {"stride_wk": 1, "stride_xk": 1, "stride_dn": 1}
    sizes = ["out", "width", "group_rows", "stride_wg", "stride_wr", "stride_bg", "stride_br",
             "stride_xr", "stride_dr"]  # fmt: skip
    if momentum:
        pointers["buffer"] = pointer_to(dtype)
        constants["stride_bk"] = 1
    else:
        constants["buffer"] = None
        sizes.append("stride_bk")
    if landed:
        loose["landed_sums"] = "*fp64"
    else:
        constants["landed_sums"] = None
    loose |= {"seed_key": "i64", "tensor": "i32", "rank": "i32"}
    annotations = rank_sgd_kernel.fn.__annotations__.items()
    loose |= {name: "fp64" for name, kind in annotations if kind == "tl.float64"}
    options = {
        "GROUPED": False, "CLIP": True, "DECAY": "coupled", "NESTEROV": False, "FIRST_STEP": False,
    }  # fmt: skip
    words = (
        pointer_to(dtype)[1:],
        "momentum" * momentum,
        "stochastic" * stochastic,
        "landed" * landed,
    )
    return Case(
        ", ".join(filter(None, words)), rank_sgd_kernel,
        pointers | loose | dict.fromkeys(sizes, "i32"),
        constants | options | _constants(dtype, tiles, stochastic), **launch_options(tiles),
        divisible=(*pointers, *sizes), dot=dtype != torch.float32,
    )  # fmt: skip


CASES = [
    _case(torch.bfloat16),
    _case(torch.bfloat16, stochastic=True),
    _case(torch.bfloat16, landed=False),
    _case(torch.bfloat16, momentum=False, landed=False),
    _case(torch.float16),
    _case(torch.float32),
    _case(torch.float64),
]
