"""Every op in plain torch: the specification, the fallback and the oracle of the tests.

Arithmetic is in the compute type C of a tensor: float64 for float64 storage, float32 for float32,
bfloat16 and float16. Products and sums are rounded one by one (no fused multiply-add), and each
stored tensor is rounded once, at the end. ``rounding="torch"`` is the exception: it *is* torch's
own foreach code, which rounds after every operation, for reproducing what stock torch does in
bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as _torch_adamw
from torch.optim.sgd import sgd as _torch_sgd

from ttt_fast.factor_reference import delta_linear, gram_norm, gram_norms, rank_update_
from ttt_fast.layer_reference import (
    attention_backward,
    glu,
    glu_backward,
    linears,
    linears_backward,
    rms_norm,
    rms_norm_backward,
    rotary,
)
from ttt_fast.rounding import GOLDEN64, MASK32, compute_dtype, random_bits, round_stochastic

__all__ = [
    "adamw_", "attention_backward", "checksum", "copy_", "delta_linear", "glu", "glu_backward",
    "grad_norm", "gram_norm", "gram_norms", "linears", "linears_backward", "nll_", "rank_sgd_",
    "rank_update_", "rms_norm", "rms_norm_backward", "rotary", "sgd_", "undo_restore_",
]  # fmt: skip

# An undo log works on runs of this many elements; a run of which more than a third changed is kept
# whole.
UNDO_CHUNK = 65536

# nll_ turns smaller gradients into 0. Tails of a softmax are denormal float32 numbers otherwise,
# which slow down every product that reads them on a CPU.
NLL_SMALLEST = 2.0**-100
# It works on this many logits at a time.
NLL_ELEMENTS = 1 << 24

_BITS_DTYPE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---------------------------------------------------------------------------- pieces of an update


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together: sqrt(Σ g²), summed in float64.

    Returns:
        0-dim, float32, or float64 when a gradient is float64. Zero for an empty list.
    """
    if not grads:
        return torch.zeros(())
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    device = grads[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        total += grad.to(torch.float64).square().sum().to(device)
    return total.sqrt().to(dtype)


def clip_coefficient(grad_norm: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, max_grad_norm / (grad_norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_``."""
    return torch.clamp(max_grad_norm / (grad_norm + 1e-6), max=1.0)


def _gradient_factor(
    grad_norm: Tensor | None, max_grad_norm: float, grad_scale: Tensor | None
) -> Tensor | None:
    """What every gradient is multiplied by: clip coefficient over GradScaler's scale."""
    factor = None
    if grad_norm is not None and max_grad_norm >= 0:
        factor = clip_coefficient(grad_norm, max_grad_norm)
    if grad_scale is not None:
        factor = 1.0 / grad_scale if factor is None else factor / grad_scale
    return factor


def _scaled_gradient(grad: Tensor, factor: Tensor | None, maximize: bool) -> Tensor:
    """The gradient in its compute type, times ``factor``, negated when maximising."""
    g = grad.to(compute_dtype(grad.dtype))
    if factor is not None:
        g = g * factor.to(device=g.device, dtype=g.dtype)
    return -g if maximize else g


def _record_landed(landed: Tensor, before: Tensor, after: Tensor, step: Tensor) -> None:
    """Add [⟨after − before, step⟩, ‖step‖²] to ``landed`` (float64)."""
    step = step.to(torch.float64)
    moved = after.to(torch.float64) - before.to(torch.float64)
    landed += torch.stack([(moved * step).sum(), step.square().sum()]).to(landed.device)


def _apply_step(
    index: int,
    param: Tensor,
    step: Tensor,
    *,
    rounding: str,
    seed: int,
    deltas: Sequence[Tensor],
    bases: Sequence[Tensor],
    landed: Tensor | None,
    undo: Sequence[Tensor],
    undo_offsets: Sequence[int],
) -> None:
    """Write round(param + step), or round(base + delta) after delta += step; log and measure it."""
    if deltas:
        deltas[index].add_(step)
        target = bases[index].to(step.dtype) + deltas[index]
    else:
        target = param.to(step.dtype) + step
    if rounding == "stochastic" and target.dtype == torch.float32:
        bits = random_bits(seed, index, param.numel(), param.device)
        after = round_stochastic(target, param.dtype, bits)
    else:
        after = target.to(param.dtype)
    _commit(index, param, after, step, landed, undo, undo_offsets)


def _commit(
    index: int,
    param: Tensor,
    after: Tensor,
    step: Tensor,
    landed: Tensor | None,
    undo: Sequence[Tensor],
    undo_offsets: Sequence[int],
) -> None:
    """Measure and log a step, then write it: in this order an interruption loses nothing."""
    if landed is not None:
        _record_landed(landed, param, after, step)
    if undo and undo_offsets[index] >= 0:
        undo_record_(undo, param, after, undo_offsets[index])
    param.copy_(after)


def _weight(index: int, param: Tensor, deltas: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
    """The weight that decay sees: base + delta where a delta is kept, else the stored weight."""
    if deltas:
        return bases[index].to(deltas[index].dtype) + deltas[index]
    return param.to(compute_dtype(param.dtype))


# ---------------------------------------------------------------------------- sgd_


def sgd_(
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
    if found_inf is not None and found_inf.item() != 0:
        return
    factor = _gradient_factor(grad_norm, max_grad_norm, grad_scale)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        g = _scaled_gradient(grad, factor, maximize).to(compute_dtype(param.dtype))
        weight = _weight(i, param, deltas, bases) if weight_decay else None
        if weight is not None and not decoupled_weight_decay:
            g = g + weight_decay * weight
        u = g
        if momentum:
            buffer = momentum_buffers[i]
            m = g if first_step else momentum * buffer.to(g.dtype) + (1.0 - dampening) * g
            u = g + momentum * m if nesterov else m
            new_buffer = m.to(buffer.dtype)
        step = u * -lr
        if weight is not None and decoupled_weight_decay:
            step = step - (lr * weight_decay) * weight
        if rounding == "torch":
            after = _torch_sgd_step(
                param, grad, factor, momentum_buffers[i : i + 1] if momentum else [], lr=lr,
                momentum=momentum, dampening=dampening, nesterov=nesterov,
                weight_decay=weight_decay, decoupled_weight_decay=decoupled_weight_decay,
                maximize=maximize, first_step=first_step,
            )  # fmt: skip
            _commit(i, param, after, step, landed, undo, undo_offsets)
            continue
        if momentum:
            buffer.copy_(new_buffer)
        _apply_step(
            i, param, step, rounding=rounding, seed=seed, deltas=deltas, bases=bases,
            landed=landed, undo=undo, undo_offsets=undo_offsets,
        )  # fmt: skip


def _torch_sgd_step(
    param: Tensor,
    grad: Tensor,
    factor: Tensor | None,
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    first_step: bool,
) -> Tensor:
    """One tensor's new value by torch's own foreach SGD; the momentum buffer is written."""
    after, grad = param.clone(), grad.clone()
    if factor is not None:
        torch._foreach_mul_([grad], factor.to(grad.device))
    if decoupled_weight_decay:
        # As foreach AdamW does it; Tensor.mul_ rounds otherwise: it keeps the factor in float32.
        torch._foreach_mul_([after], 1.0 - lr * weight_decay)
        weight_decay = 0.0
    buffers: list[Tensor | None] = [None if first_step else b for b in momentum_buffers] or [None]
    _torch_sgd(
        [after], [grad], buffers, foreach=True, lr=lr, momentum=momentum, dampening=dampening,
        nesterov=nesterov, weight_decay=weight_decay, maximize=maximize,
    )  # fmt: skip
    if first_step and momentum_buffers:
        momentum_buffers[0].copy_(buffers[0])
    return after


# ---------------------------------------------------------------------------- adamw_


def _square_root(x: Tensor) -> Tensor:
    """Correctly rounded square root of float32 or float64.

    torch's own on the CPU comes from a vector library and misses the last bit of one value in six
    in float32, one in eighty in float64; processors and compilers elsewhere round correctly.
    """
    if x.dtype == torch.float32:
        return x.to(torch.float64).sqrt().to(torch.float32)
    # One Newton step on the exact residual x - s·s, from Dekker's product of s with itself.
    s = x.sqrt()
    split = s * 134217729.0
    high = split - (split - s)
    low = s - high
    square = s * s
    rest = ((high * high - square) + 2.0 * high * low) + low * low
    refined = s + ((x - square) - rest) / (2.0 * s)
    return torch.where(refined.isfinite(), refined, s)


def adamw_(
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
    if found_inf is not None and found_inf.item() != 0:
        return
    factor = _gradient_factor(grad_norm, max_grad_norm, grad_scale)
    step_size = lr / (1.0 - beta1**step_index)
    sqrt_correction2 = (1.0 - beta2**step_index) ** 0.5
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        g = _scaled_gradient(grad, factor, maximize).to(compute_dtype(param.dtype))
        m = exp_avgs[i].to(g.dtype)
        m = m + (1.0 - beta1) * (g - m)
        v = beta2 * exp_avg_sqs[i].to(g.dtype) + (1.0 - beta2) * (g * g)
        step = (m / (_square_root(v) / sqrt_correction2 + eps)) * -step_size
        if weight_decay:
            step = step - (lr * weight_decay) * _weight(i, param, deltas, bases)
        if rounding == "torch":
            after, grad = param.clone(), grad.clone()
            if factor is not None:
                torch._foreach_mul_([grad], factor.to(grad.device))
            _torch_adamw(
                [after], [grad], [exp_avgs[i]], [exp_avg_sqs[i]], [],
                [torch.tensor(float(step_index - 1))], foreach=True, amsgrad=False, beta1=beta1,
                beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=maximize,
            )  # fmt: skip
            _commit(i, param, after, step, landed, undo, undo_offsets)
            continue
        exp_avgs[i].copy_(m)
        exp_avg_sqs[i].copy_(v)
        _apply_step(
            i, param, step, rounding=rounding, seed=seed, deltas=deltas, bases=bases,
            landed=landed, undo=undo, undo_offsets=undo_offsets,
        )  # fmt: skip


def rank_sgd_(
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
    grads = []
    for param, x, dy in zip(params, xs, dys, strict=True):
        wide = compute_dtype(param.dtype)
        grads.append(dy.to(wide).t().mm(x.to(wide)).view(param.shape))
    sgd_(
        params, grads, momentum_buffers, grad_norm=grad_norm, found_inf=found_inf, landed=landed,
        lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov,
        weight_decay=weight_decay, decoupled_weight_decay=decoupled_weight_decay,
        first_step=first_step, max_grad_norm=max_grad_norm, rounding=rounding, seed=seed,
    )  # fmt: skip


def nll_(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """See :func:`ttt_fast.ops.nll_`.

    With e = exp(z − max z) and o the sum of e without the target's:

        loss = max z − z_t + log1p(o + (e_t − 1)),    dz = e / Σe,    dz_t = −o / Σe

    which loses no digits where the target is nearly certain, as softmax − 1 does. A target out of
    range gives NaN: on a GPU nothing else can be said without waiting for it.
    """
    losses = logits.new_empty(targets.shape, dtype=compute_dtype(logits.dtype))
    rows = max(1, NLL_ELEMENTS // logits.shape[1])
    blocks = zip(logits.split(rows), targets.split(rows), losses.split(rows), strict=True)
    for block, target, loss in blocks:
        z = block.to(losses.dtype)
        kept = target != ignore_index
        column = target.clamp(0, z.shape[1] - 1)
        outside = kept & (target != column)
        column = column[:, None]
        maximum = z.amax(1, keepdim=True)
        e = (z - maximum).exp_()
        e_target = e.gather(1, column).masked_fill_(outside[:, None], torch.nan)
        others = e.scatter_(1, column, 0.0).sum(1, keepdim=True)
        total = others + e_target
        value = (maximum - z.gather(1, column)) + torch.log1p(others + (e_target - 1.0))
        loss.copy_(value[:, 0].masked_fill_(~kept, 0.0))
        e.scatter_(1, column, -others)
        e.masked_fill_(e.abs() < NLL_SMALLEST * total, 0.0).mul_(1.0 / total)
        block.copy_(e.masked_fill_(~kept[:, None], 0.0))
    return losses


# ---------------------------------------------------------------------------- copies and undo


def copy_(dsts: Sequence[Tensor], srcs: Sequence[Tensor]) -> None:
    """See :func:`ttt_fast.ops.copy_`."""
    for dst, src in zip(dsts, srcs, strict=True):
        dst.copy_(src)


def undo_record_(undo: Sequence[Tensor], before: Tensor, after: Tensor, offset: int) -> None:
    """Log the old bits of every element that changed. See :class:`ttt_fast.undo.UndoLog`."""
    index, value, cursor, counts, paged, pages = undo
    old = before.contiguous().view(torch.int16).flatten()
    new = after.contiguous().view(torch.int16).flatten()
    for start in range(0, old.numel(), UNDO_CHUNK):
        run = old[start : start + UNDO_CHUNK]
        chunk = (offset + start) // UNDO_CHUNK
        if paged[chunk]:
            continue
        changed = (run != new[start : start + UNDO_CHUNK]).nonzero().flatten()
        count = changed.numel()
        if int(counts[chunk]) + count > run.numel() // 3:
            pages[offset + start : offset + start + run.numel()] = run
            paged[chunk] = 1
            continue
        at = int(cursor)
        where = changed + (offset + start)
        # Indices are unsigned 32-bit numbers kept in int32.
        index[at : at + count] = torch.where(where >= 1 << 31, where - (1 << 32), where).to(
            torch.int32
        )
        value[at : at + count] = run[changed]
        counts[chunk] += count
        cursor += count


def undo_restore_(
    params: Sequence[Tensor], undo: Sequence[Tensor], undo_offsets: Sequence[int]
) -> None:
    """See :func:`ttt_fast.ops.undo_restore_`."""
    index, value, cursor, _, paged, pages = undo
    used = int(cursor)
    where = index[:used].to(torch.int64) & MASK32
    for param, offset in zip(params, undo_offsets, strict=True):
        if offset < 0:
            continue
        bits = param.contiguous().view(torch.int16).flatten().clone()
        for start in range(0, bits.numel(), UNDO_CHUNK):
            stop = min(start + UNDO_CHUNK, bits.numel())
            if paged[(offset + start) // UNDO_CHUNK]:
                bits[start:stop] = pages[offset + start : offset + stop]
        mine = ((where >= offset) & (where < offset + bits.numel())).nonzero().flatten()
        # An element may have been logged at several steps: its oldest entry holds the original.
        element, order = torch.sort(where[mine] - offset, stable=True)
        oldest = torch.ones_like(element, dtype=torch.bool)
        oldest[1:] = element[1:] != element[:-1]
        bits[element[oldest]] = value[mine[order[oldest]]]
        param.copy_(bits.view(param.dtype).reshape(param.shape))


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """Order-sensitive 64-bit checksum of the bits of all tensors.

        Σ_t (2t+1) · Σ_i mix(x_i + (i+1)·φ),   mix(z) = (y ^ (y >> 32))·M,  y = z·M   (mod 2⁶⁴)

    with M = 0xD6E8FEB86659FD93; without the first product, one weight a bit up and another a bit
    down would cancel.
    x_i: bits of element i (logical order) as a signed integer of the element's size; shifts are
        logical.

    Returns:
        0-dim int64 on the CPU.
    """
    total = torch.zeros((), dtype=torch.int64)
    phi = GOLDEN64 - (1 << 64)
    for t, tensor in enumerate(tensors):
        bits = tensor.detach().contiguous().flatten().view(_BITS_DTYPE[tensor.element_size()])
        z = bits.to(torch.int64)
        z = z + torch.arange(1, z.numel() + 1, dtype=torch.int64, device=z.device) * phi
        z *= 0xD6E8FEB86659FD93 - (1 << 64)
        z = (z ^ ((z >> 32) & MASK32)) * (0xD6E8FEB86659FD93 - (1 << 64))
        total += z.sum().cpu() * (2 * t + 1)
    return total
