"""The ops: checked arguments, documented; :mod:`ttt_fast.dispatch` has what runs behind them.

Tensors may be views with an offset, and strided as :class:`ttt_fast.selection.RowSlice` makes them.
Lists may mix sizes and dtypes. Storage is float32, bfloat16, float16 or float64; arithmetic is
float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_fast import placement
from ttt_fast.dispatch import (
    SCHEMAS,
    backend_for,
    choose,
    choose_for,
    choose_for_update,
    implementation,
)
from ttt_fast.factor_ops import delta_linear, gram_norm, gram_norms, rank_update_
from ttt_fast.layer_ops import (
    attention_backward,
    glu,
    glu_backward,
    linears,
    linears_backward,
    rms_norm,
    rms_norm_backward,
    rotary,
)
from ttt_fast.op_checks import (
    ROUNDINGS,
    check_clip,
    check_factors,
    check_momentum,
    check_own_rounding,
    check_pairs,
    check_update,
)
from ttt_fast.undo import UndoLog

__all__ = [
    "ROUNDINGS", "SCHEMAS", "UndoLog", "adamw_", "attention_backward", "backend_for", "checksum",
    "copy_", "delta_linear", "glu", "glu_backward", "grad_norm", "gram_norm", "gram_norms",
    "implementation", "linears", "linears_backward", "nll_", "rank_sgd_", "rank_update_",
    "rms_norm", "rms_norm_backward", "rotary", "sgd_", "undo_restore_",
]  # fmt: skip


@torch.no_grad()
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    grad_norm: Tensor | None = None,
    max_grad_norm: float | None = None,
    deltas: Sequence[Tensor] = (),
    bases: Sequence[Tensor] = (),
    rounding: str = "nearest",
    seed: int = 0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    landed: Tensor | None = None,
    undo: UndoLog | None = None,
    backend: str = "auto",
) -> None:
    """Clip and apply one SGD step to every parameter, in place, as ``torch.optim.SGD``.

        g ← ± g · min(1, max_grad_norm / (grad_norm + 1e-6)) / grad_scale
        g ← g + weight_decay · w                                (coupled decay)
        m ← g on the first step, momentum · m + (1 − dampening) · g later
        u ← g + momentum · m if nesterov, m if momentum, g otherwise
        Δ = −lr · u  [− lr · weight_decay · w  (decoupled decay)]
        w ← round(w + Δ),   or with deltas   d ← d + Δ,  w ← round(base + d)

    Args:
        params: n tensors. Mutated.
        grads: n gradients, dtype of their parameter or float32.
        momentum_buffers: n tensors if ``momentum`` is not 0, dtype of their parameter or float32.
            Mutated; not read when ``first_step``.
        lr: step size.
        momentum: momentum factor μ.
        dampening: dampening of momentum, not applied on the first step.
        nesterov: use Nesterov momentum.
        weight_decay: L2 coefficient.
        decoupled_weight_decay: decay the weight itself instead of adding to the gradient.
        maximize: ascend.
        first_step: the momentum buffers are to be initialised.
        grad_norm: 0-dim tensor, norm of the unscaled gradients; needed to clip. With
            rounding="torch" in 16 bits, to have stock ``clip_grad_norm_`` bit for bit, pass torch's
            own, which is in the gradients' dtype: ``torch.nn.utils.get_total_norm(grads,
            foreach=True)``.
        max_grad_norm: clip threshold, None for no clipping.
        deltas: n tensors in the compute type, accumulate="delta". Mutated.
        bases: n tensors, the original weights, with ``deltas``.
        rounding: "nearest" (one rounding a step), "stochastic" (seeded, 16-bit weights), or
            "torch": torch's own foreach code with a rounding after every operation.
        seed: counter of the random bits; give another one at each step.
        grad_scale: 0-dim tensor, GradScaler's scale of the gradients.
        found_inf: 0-dim tensor; where it is not 0 nothing is changed.
        landed: (2,) float64. [Σ⟨w' − w, Δ⟩, Σ‖Δ‖²] is added.
        undo: log of the overwritten bits; ``params`` must be those it was made for.
        backend: "auto", "torch", "cpp", "triton" or "cuda".

    Raises:
        ValueError: lists do not pair up, unsupported dtype or option.
    """
    check_momentum("sgd_", momentum, momentum_buffers, params)
    check_clip("sgd_", max_grad_norm, grad_norm, "ops.grad_norm(grads)")
    states = {"momentum_buffers": momentum_buffers} if momentum else {}
    check_update("sgd_", params, grads, states, deltas, bases, rounding, undo)
    torch.ops.ttt_fast.sgd_(
        list(params), list(grads), list(momentum_buffers) if momentum else [], list(deltas),
        list(bases), grad_norm, grad_scale, found_inf, landed, undo.tensors if undo else [],
        undo.offsets if undo else [], lr=float(lr), momentum=float(momentum),
        dampening=float(dampening), nesterov=nesterov, weight_decay=float(weight_decay),
        decoupled_weight_decay=decoupled_weight_decay, maximize=maximize, first_step=first_step,
        max_grad_norm=-1.0 if max_grad_norm is None else float(max_grad_norm), rounding=rounding,
        seed=seed, backend=choose_for_update("sgd_", params, rounding, backend),
    )  # fmt: skip


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    step_index: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
    grad_norm: Tensor | None = None,
    max_grad_norm: float | None = None,
    deltas: Sequence[Tensor] = (),
    bases: Sequence[Tensor] = (),
    rounding: str = "nearest",
    seed: int = 0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    landed: Tensor | None = None,
    undo: UndoLog | None = None,
    backend: str = "auto",
) -> None:
    """Clip and apply one AdamW step to every parameter, in place, as ``torch.optim.AdamW``.

        g ← ± g · min(1, max_grad_norm / (grad_norm + 1e-6)) / grad_scale
        m ← m + (1 − β₁)(g − m),   v ← β₂ v + (1 − β₂) g²
        Δ = −lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps) − lr · weight_decay · w
        w ← round(w + Δ),   or with deltas   d ← d + Δ,  w ← round(base + d)

    Args:
        params: n tensors. Mutated.
        grads: n gradients, dtype of their parameter or float32.
        exp_avgs: n first moments m, dtype of their parameter or float32; zeros before the first
            step. Mutated.
        exp_avg_sqs: n second moments v, likewise. Mutated.
        lr: step size.
        step_index: t, 1 at the first step.
        betas: (β₁, β₂).
        eps: added to the denominator.
        weight_decay: decoupled decay.
        maximize: ascend.
        grad_norm: see :func:`sgd_`, as all that follow.
        max_grad_norm: clip threshold, None for no clipping.
        deltas: accumulate="delta".
        bases: the original weights, with ``deltas``.
        rounding: "nearest", "stochastic" or "torch".
        seed: counter of the random bits.
        grad_scale: GradScaler's scale.
        found_inf: where it is not 0 nothing is changed.
        landed: (2,) float64, added to.
        undo: log of the overwritten bits.
        backend: "auto", "torch", "cpp", "triton" or "cuda".

    Raises:
        ValueError: lists do not pair up, unsupported dtype or option.
    """
    if step_index < 1:
        raise ValueError(f"adamw_: step_index={step_index}; it counts from 1.")
    check_clip("adamw_", max_grad_norm, grad_norm, "ops.grad_norm(grads)")
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_update("adamw_", params, grads, states, deltas, bases, rounding, undo)
    torch.ops.ttt_fast.adamw_(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(deltas), list(bases),
        grad_norm, grad_scale, found_inf, landed, undo.tensors if undo else [],
        undo.offsets if undo else [], lr=float(lr), beta1=float(betas[0]), beta2=float(betas[1]),
        eps=float(eps), weight_decay=float(weight_decay), maximize=maximize, step_index=step_index,
        max_grad_norm=-1.0 if max_grad_norm is None else float(max_grad_norm), rounding=rounding,
        seed=seed, backend=choose_for_update("adamw_", params, rounding, backend),
    )  # fmt: skip


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Global norm of a list of gradients: sqrt(Σ g²), in an order that does not depend on threads.

    Args:
        grads: n tensors of any floating dtype; on several devices, their norms are combined on the
            first one's.
        backend: "auto", "torch", "cpp", "triton" or "cuda".

    Returns:
        0-dim float32 tensor on their device (float64 when a gradient is float64); 0 for an empty
        list.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    norms = [
        torch.ops.ttt_fast.grad_norm(local, backend=choose_for("grad_norm", local, backend))
        for local in by_device.values() or [[]]
    ]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


@torch.no_grad()
def rank_sgd_(
    params: Sequence[Tensor],
    xs: Sequence[Tensor],
    dys: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    first_step: bool = False,
    grad_norm: Tensor | None = None,
    max_grad_norm: float | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    found_inf: Tensor | None = None,
    landed: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One SGD step on weights whose gradients are products of factors:  g = dyᵀ x.

    :func:`sgd_` of the gradients in the compute type, which in "triton" are nowhere in memory;
    "torch" forms them.

    Args:
        params: n weights, (out, in) or, as slices of a fused projection are, (k, out / k, in); any
            strides. Mutated.
        xs: n layer inputs, (R, in), dtype of their weight. R may be 0.
        dys: n gradients at the layer's output, (R, out), likewise.
        momentum_buffers: see :func:`sgd_`, as all that follow. Mutated.
        lr: step size.
        momentum: momentum factor μ.
        dampening: dampening of momentum.
        nesterov: use Nesterov momentum.
        weight_decay: L2 coefficient.
        decoupled_weight_decay: decay the weight itself instead of adding to the gradient.
        first_step: the momentum buffers are to be initialised.
        grad_norm: norm of all gradients of the step (:func:`gram_norms`); needed to clip.
        max_grad_norm: clip threshold, None for no clipping.
        rounding: "nearest" or "stochastic"; the bits are those of :func:`sgd_`.
        seed: counter of the random bits.
        found_inf: where it is not 0 nothing is changed.
        landed: (2,) float64, added to.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: lists do not pair up, unsupported dtype or option.
    """
    check_momentum("rank_sgd_", momentum, momentum_buffers, params)
    check_clip("rank_sgd_", max_grad_norm, grad_norm, "ops.gram_norms(xs, dys)")
    check_own_rounding("rank_sgd_", rounding)
    states = {"momentum_buffers": momentum_buffers} if momentum else {}
    # The gradients are not there to be checked; their factors follow.
    check_update("rank_sgd_", params, params, states, (), (), rounding, None)
    check_pairs("rank_sgd_", params, xs, dys)
    torch.ops.ttt_fast.rank_sgd_(
        list(params), list(xs), list(dys), list(momentum_buffers) if momentum else [], grad_norm,
        found_inf, landed, lr=float(lr), momentum=float(momentum), dampening=float(dampening),
        nesterov=nesterov, weight_decay=float(weight_decay),
        decoupled_weight_decay=decoupled_weight_decay, first_step=first_step,
        max_grad_norm=-1.0 if max_grad_norm is None else float(max_grad_norm), rounding=rounding,
        seed=seed, backend=choose_for("rank_sgd_", params, backend),
    )  # fmt: skip


@torch.no_grad()
def nll_(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, backend: str = "auto"
) -> Tensor:
    """Negative log-likelihood of each token; its gradient takes the place of the logits.

        loss = −log softmax(logits)[target],    logits ← softmax(logits) − onehot(target)

    Statistics are in the compute type. Gradients smaller than 2⁻¹⁰⁰ become 0: as denormal numbers
    they would slow down every later product on a CPU. A row with a NaN or +∞ has a loss that is not
    finite, −∞ is a token that cannot be. Not differentiable: the caller multiplies ``logits`` by
    the gradient of its loss.

    Args:
        logits: (M, V), any strides, V ≥ 1. Mutated; rows that are ignored become 0.
        targets: (M,) int64.
        ignore_index: target of the rows that do not count.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        (M,) float32, or float64 for float64; 0 where ignored.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or a target is out of range. On other
            devices than the CPU, which would have to be waited for, that row's loss is NaN instead.
    """
    tensors = [("logits", logits, ("M", "V"), ()), ("targets", targets, ("M",), (torch.int64,))]
    check_factors("nll_", logits, tensors, {})
    vocabulary = logits.shape[1]
    if vocabulary == 0:
        raise ValueError("nll_: logits have no columns; V must be at least 1.")
    if not placement.look_waits(logits.device) and not torch.compiler.is_compiling():
        wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"nll_: targets[{row}] is {int(targets[row])}; it must be between 0 and "
                f"{vocabulary - 1}, or ignore_index={ignore_index} for a row that does not count."
            )
    return torch.ops.ttt_fast.nll_(
        logits, targets, ignore_index=ignore_index,
        backend=choose("nll_", logits.device.type, backend),
    )  # fmt: skip


@torch.no_grad()
def copy_(dsts: Sequence[Tensor], srcs: Sequence[Tensor], *, backend: str = "auto") -> None:
    """Copy every source into its destination, bit for bit.

    Args:
        dsts: n tensors. Mutated.
        srcs: n tensors of the same shapes and dtypes, possibly on another device.
        backend: "auto", "torch", "cpp", "triton" or "cuda".

    Raises:
        ValueError: lists do not pair up.
    """
    if len(dsts) != len(srcs):
        raise ValueError(f"copy_: got {len(dsts)} dsts but {len(srcs)} srcs; give one for each.")
    for i, (dst, src) in enumerate(zip(dsts, srcs, strict=True)):
        if dst.shape != src.shape or dst.dtype != src.dtype:
            raise ValueError(
                f"copy_: srcs[{i}] is {tuple(src.shape)} {src.dtype} but dsts[{i}] is "
                f"{tuple(dst.shape)} {dst.dtype}; they must agree."
            )
    devices = {tensor.device for tensor in [*dsts, *srcs]}
    if len(devices) > 1 and backend not in ("auto", "torch"):
        raise ValueError(
            f"copy_: backend={backend!r} copies within one device, but the tensors are on "
            f"{' and '.join(sorted(map(str, devices)))}; use backend='auto'."
        )
    # Between devices only torch can copy; that is what "auto" means there.
    chosen = "torch" if len(devices) > 1 else choose_for("copy_", dsts, backend)
    torch.ops.ttt_fast.copy_(list(dsts), list(srcs), backend=chosen)


@torch.no_grad()
def undo_restore_(params: Sequence[Tensor], undo: UndoLog, *, backend: str = "auto") -> None:
    """Write back every logged bit: runs that were kept whole first, then the entries, newest first.

    Args:
        params: the parameters that ``undo`` was made for. Mutated. Untracked ones are left alone.
        undo: the log; it stays as it is, so that restoring again changes nothing.
        backend: "auto", "torch", "cpp", "triton" or "cuda".
    """
    chosen = choose_for("undo_restore_", params, backend)
    torch.ops.ttt_fast.undo_restore_(list(params), undo.tensors, undo.offsets, backend=chosen)


@torch.no_grad()
def checksum(tensors: Sequence[Tensor], *, backend: str = "auto") -> int:
    """64-bit checksum of the bits of all tensors in order (formula: ``reference.checksum``)."""
    chosen = choose_for("checksum", tensors, backend)
    return int(torch.ops.ttt_fast.checksum(list(tensors), backend=chosen))
