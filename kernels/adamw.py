"""AdamW on all tensors of a call, one launch for each combination of dtypes.

Fused: clip factor, moments, bias corrections, decoupled decay, delta, write, rounding, undo log,
update_landed.
Bytes per element, nothing read or written twice: 14 in bfloat16 (read g, m, v, w; write m, v, w),
28 in float32, 22 in bfloat16 with a float32 delta (then w is written only; + 2 with the undo log or
update_landed); for a chunk of 4096 elements 16 bytes of tables and 8 for each list. Bound: memory
bandwidth.
Reference: adamw_ in ttt_fast/reference.py, bit for bit: no fused multiply-add, quotients and roots
correctly rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import chunk_pointer, divide, read, scalar, square_root, write
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


@triton.jit(
    do_not_specialize=["n_chunks", "seed_key"],
    # A slot of a ring has any alignment.
    do_not_specialize_on_alignment=["grad_norm", "grad_scale", "found_inf"],
)
def adamw_kernel(
    pointers, numels, index, tensors, n_chunks, grad_norm, grad_scale, found_inf, landed_sums,
    undo_index, undo_value, undo_cursor, undo_counts, undo_paged, undo_pages, undo_offsets,
    undo_states, seed_key: tl.int64, max_grad_norm: tl.float64, one_minus_beta1: tl.float64,
    beta2: tl.float64, one_minus_beta2: tl.float64, sqrt_correction2: tl.float64, eps: tl.float64,
    minus_step_size: tl.float64, lr_weight_decay: tl.float64,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, STATE2: tl.constexpr,
    COMPUTE: tl.constexpr, CLIP: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr,
    DELTA: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of the lists params, grads, deltas, bases, first moments, second moments."""
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
            first = chunk_pointer(pointers, n_chunks, chunk, STATES, STATE, ALIGNED) + lanes
            m = read(first, mask, MASKED).to(COMPUTE)
            m += scalar(one_minus_beta1, COMPUTE) * (g - m)
            write(first, m.to(STATE), mask, MASKED)
            second = chunk_pointer(pointers, n_chunks, chunk, STATES + 1, STATE2, ALIGNED) + lanes
            v = scalar(beta2, COMPUTE) * read(second, mask, MASKED).to(COMPUTE)
            v += scalar(one_minus_beta2, COMPUTE) * (g * g)
            write(second, v.to(STATE2), mask, MASKED)
            denominator = divide(square_root(v), scalar(sqrt_correction2, COMPUTE))
            denominator += scalar(eps, COMPUTE)
            step = divide(m, denominator) * scalar(minus_step_size, COMPUTE)
            if DECAY:
                step -= scalar(lr_weight_decay, COMPUTE) * weight
            apply_step(
                pointers, n_chunks, place, step, before, base, delta, lanes, mask, landed_sums,
                undo, PARAM, COMPUTE, DELTA, LANDED, STOCHASTIC, UNDO, ALIGNED, MASKED,
            )  # fmt: skip


def adamw_launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
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
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
    step_index: int = 1,
    max_grad_norm: float = -1.0,
    rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """See :func:`ttt_fast.ops.adamw_`, which checks the arguments."""
    launch_update(
        adamw_kernel,
        [params, grads, deltas, bases, exp_avgs, exp_avg_sqs],
        {0: "adamw_: params", 2: "adamw_: deltas", 4: "adamw_: exp_avgs", 5: "adamw_: exp_avg_sqs"},
        {"grad_norm": grad_norm, "grad_scale": grad_scale, "found_inf": found_inf},
        landed, undo, undo_offsets, rounding=rounding, seed=seed, max_grad_norm=max_grad_norm,
        one_minus_beta1=1.0 - beta1, beta2=beta2, one_minus_beta2=1.0 - beta2,
        sqrt_correction2=(1.0 - beta2**step_index) ** 0.5, eps=eps,
        minus_step_size=-(lr / (1.0 - beta1**step_index)), lr_weight_decay=lr * weight_decay,
        CLIP=grad_norm is not None and max_grad_norm >= 0, MAXIMIZE=maximize,
        DECAY=weight_decay != 0,
    )  # fmt: skip


def _case(name: str, bytes_per_element: float, dtypes: tuple, **kwargs: bool | str) -> Case:
    options = {"CLIP": True, "MAXIMIZE": False, "DECAY": True}
    return update_case(name, adamw_kernel, bytes_per_element, dtypes, options, **kwargs)


_B, _F, _H, _D = torch.bfloat16, torch.float32, torch.float16, torch.float64
# dtypes of params, grads, deltas, bases, moments
CASES = [
    _case("bfloat16", 14, (_B, _B, None, None, _B, _B)),
    _case("float16, stochastic", 14, (_H, _H, None, None, _H, _H), rounding="stochastic"),
    _case("float32", 28, (_F, _F, None, None, _F, _F)),
    _case("float64", 56, (_D, _D, None, None, _D, _D)),
    _case("bfloat16, float32 delta", 22, (_B, _B, _F, _B, _B, _B)),
    _case(
        "bfloat16, float32 moments, undo log, landed", 22, (_B, _B, None, None, _F, _F),
        landed=True, undo=True, rounding="stochastic",
    ),
]  # fmt: skip
