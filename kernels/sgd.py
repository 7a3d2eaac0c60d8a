"""SGD on all tensors of a call, one launch for each combination of dtypes.

Fused: clip factor, decay, momentum, Nesterov, delta, write, rounding, undo log, update_landed.
Bytes per element, nothing read or written twice:

    plain                       6 in bfloat16 (read g, w; write w), 12 in float32
    momentum (and decay)       10 in bfloat16 (read g, w, m; write w, m), 20 in float32
    momentum, float32 delta    18 in bfloat16 (read g, m, base, delta; write w, m, delta);
                               + 2 with the undo log or update_landed, which compare with w

and, for a chunk of 4096 elements, 16 bytes of tables and 8 for each list. Bound: memory bandwidth,
or, with update_landed on a GPU with few float64 units, its five float64 operations an element.
Reference: sgd_ in ttt_fast/reference.py, bit for bit: no fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import chunk_pointer, read, scalar, write
from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.update import (
    GRADS,
    STATES,
    apply_step,
    launch_update,
    live_numel,
    read_weight,
    scale_gradient,
    update_case,
)


@triton.jit
def decayed_gradient(g, weight, weight_decay, COMPUTE: tl.constexpr, DECAY: tl.constexpr):
    """Return the gradient with coupled decay; DECAY is "none", "coupled" or "decoupled"."""
    if DECAY == "coupled":
        g += scalar(weight_decay, COMPUTE) * weight
    return g


@triton.jit
def new_momentum(g, m, momentum, keep, COMPUTE: tl.constexpr):
    """Return momentum · m + keep · g, where keep = 1 - dampening."""
    return scalar(momentum, COMPUTE) * m + scalar(keep, COMPUTE) * g


@triton.jit
def sgd_step(
    g, m, weight, momentum, minus_lr, lr_weight_decay, COMPUTE: tl.constexpr,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """Return what is added to the weight; ``m``, the new momentum, is not used without MOMENTUM."""
    u = g
    if MOMENTUM:
        u = m
        if NESTEROV:
            u = g + scalar(momentum, COMPUTE) * m
    step = u * scalar(minus_lr, COMPUTE)
    if DECAY == "decoupled":
        step -= scalar(lr_weight_decay, COMPUTE) * weight
    return step


@triton.jit(
    do_not_specialize=["n_chunks", "seed_key"],
    # A slot of a ring has any alignment.
    do_not_specialize_on_alignment=["grad_norm", "grad_scale", "found_inf"],
)
def sgd_kernel(
    pointers, numels, index, tensors, n_chunks, grad_norm, grad_scale, found_inf, landed_sums,
    undo_index, undo_value, undo_cursor, undo_counts, undo_paged, undo_pages, undo_offsets,
    undo_states, seed_key: tl.int64, max_grad_norm: tl.float64, momentum: tl.float64,
    keep: tl.float64, weight_decay: tl.float64, minus_lr: tl.float64, lr_weight_decay: tl.float64,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, COMPUTE: tl.constexpr,
    CLIP: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr, NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr, DELTA: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of the lists params, grads, deltas, bases, momentum buffers.

    STATE is None without momentum.
    """
    chunk = tl.program_id(0)
    numel = live_numel(tl.load(numels + chunk), found_inf)
    place = (chunk, numel, tl.load(index + chunk), tl.load(tensors + chunk), seed_key)
    undo = (
        undo_index, undo_value, undo_cursor, undo_counts, undo_paged, undo_pages, undo_offsets,
        undo_states,
    )  # fmt: skip
    LANDED: tl.constexpr = landed_sums is not None
    UNDO: tl.constexpr = undo_states is not None
    lanes = tl.arange(0, BLOCK)
    mask = lanes < numel
    # The body stands in the code twice: masks would cost a full chunk its wide accesses.
    for MASKED in tl.static_range(2):
        if (numel < BLOCK) == (MASKED == 1):
            before, base, delta, weight = read_weight(
                pointers, n_chunks, chunk, lanes, mask, PARAM, COMPUTE, DELTA, LANDED or UNDO,
                ALIGNED, MASKED,
            )  # fmt: skip
            grad_pointer = chunk_pointer(pointers, n_chunks, chunk, GRADS, GRAD, ALIGNED)
            g = read(grad_pointer + lanes, mask, MASKED).to(COMPUTE)
            g = scale_gradient(g, grad_norm, max_grad_norm, grad_scale, CLIP, MAXIMIZE)
            g = decayed_gradient(g, weight, weight_decay, COMPUTE, DECAY)
            m = g
            if STATE is not None:
                buffer = chunk_pointer(pointers, n_chunks, chunk, STATES, STATE, ALIGNED) + lanes
                if not FIRST_STEP:
                    m = read(buffer, mask, MASKED).to(COMPUTE)
                    m = new_momentum(g, m, momentum, keep, COMPUTE)
                # Before the step is made: later, it costs six registers.
                write(buffer, m.to(STATE), mask, MASKED)
            step = sgd_step(
                g, m, weight, momentum, minus_lr, lr_weight_decay, COMPUTE, STATE is not None,
                DECAY, NESTEROV,
            )  # fmt: skip
            apply_step(
                pointers, n_chunks, place, step, before, base, delta, lanes, mask, landed_sums,
                undo, PARAM, COMPUTE, DELTA, LANDED, STOCHASTIC, UNDO, ALIGNED, MASKED,
            )  # fmt: skip


def decay_kind(weight_decay: float, decoupled: bool) -> str:
    """DECAY of a launch."""
    if weight_decay == 0:
        return "none"
    return "decoupled" if decoupled else "coupled"


def sgd_launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    deltas: Sequence[Tensor] = (),
    bases: Sequence[Tensor] = (),
    grad_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    landed: Tensor | None = None,
    undo: Sequence[Tensor] = (),
    undo_offsets: Sequence[int] = (),
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    max_grad_norm: float = -1.0,
    rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """See :func:`ttt_fast.ops.sgd_`, which checks the arguments."""
    launch_update(
        sgd_kernel,
        [params, grads, deltas, bases, momentum_buffers if momentum else []],
        {0: "sgd_: params", 2: "sgd_: deltas", 4: "sgd_: momentum_buffers"},
        {"grad_norm": grad_norm, "grad_scale": grad_scale, "found_inf": found_inf},
        landed, undo, undo_offsets, rounding=rounding, seed=seed, max_grad_norm=max_grad_norm,
        momentum=momentum, keep=1.0 - dampening, weight_decay=weight_decay, minus_lr=-lr,
        lr_weight_decay=lr * weight_decay, CLIP=grad_norm is not None and max_grad_norm >= 0,
        MAXIMIZE=maximize, DECAY=decay_kind(weight_decay, decoupled_weight_decay),
        NESTEROV=nesterov, FIRST_STEP=first_step,
    )  # fmt: skip


def _case(
    name: str, bytes_per_element: float, dtypes: tuple, options: dict | None = None, **kwargs: Any
) -> Case:
    defaults = {
        "CLIP": True, "MAXIMIZE": False, "DECAY": "coupled", "NESTEROV": False, "FIRST_STEP": False,
    }  # fmt: skip
    return update_case(
        name, sgd_kernel, bytes_per_element, dtypes, defaults | (options or {}), **kwargs
    )


_B, _F, _H, _D = torch.bfloat16, torch.float32, torch.float16, torch.float64
# dtypes of params, grads, deltas, bases, momentum buffers
CASES = [
    _case("bfloat16, momentum", 10, (_B, _B, None, None, _B)),
    _case("bfloat16, momentum, first step", 8, (_B, _B, None, None, _B), {"FIRST_STEP": True}),
    _case("bfloat16", 6, (_B, _B, None, None, None), {"DECAY": "none"}),
    _case("float16, momentum, stochastic", 10, (_H, _H, None, None, _H), rounding="stochastic"),
    _case("float32, momentum", 20, (_F, _F, None, None, _F)),
    _case("float64, momentum", 40, (_D, _D, None, None, _D)),
    _case("bfloat16, momentum, landed", 10, (_B, _B, None, None, _B), landed=True),
    _case("bfloat16, momentum, float32 delta", 18, (_B, _B, _F, _B, _B)),
    _case(
        "bfloat16, momentum, stochastic, undo log, landed", 10, (_B, _B, None, None, _B),
        {"NESTEROV": True, "DECAY": "decoupled"}, landed=True, undo=True, rounding="stochastic",
    ),
    _case("float64, momentum, delta, landed", 64, (_D, _D, _D, _D, _D), landed=True),
]  # fmt: skip
