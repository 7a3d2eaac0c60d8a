"""The ops: schema, fake and public wrapper of each; the only file that says ``torch.ops``.

Every op exists once as ``torch.ops.ttt_fast.<name>``, opaque to ``torch.compile``, and runs the
backend that :func:`ttt_fast.backend.resolve_backend` names: plain torch (``reference.py``) or the
C++ extension (``csrc/``).

Tensors may be views with an offset, and strided as :class:`ttt_fast.scope.RowSlice` makes them.
Lists may mix sizes and dtypes. Storage is float32, bfloat16, float16 or float64; arithmetic is
float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_fast import reference
from ttt_fast.backend import resolve_backend
from ttt_fast.reference import compute_dtype
from ttt_fast.undo import UndoLog

__all__ = ["UndoLog", "adamw_", "checksum", "copy_", "grad_norm", "sgd_", "undo_restore_"]

ROUNDINGS = ("nearest", "stochastic", "torch")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---------------------------------------------------------------------------- registration

_LIBRARY = torch.library.Library("ttt_fast", "DEF")

_UPDATE_TENSORS = (
    "Tensor(d!)[] deltas, Tensor[] bases, Tensor? grad_norm, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor(e!)? landed, Tensor(f!)[] undo, int[] undo_offsets, *, "
)
# name -> (arguments, returned, names of the tensor lists that the op mutates).
# csrc/ops.cpp registers the same arguments, less `backend`, in the namespace ttt_fast_cpp.
SCHEMAS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sgd_": (
        "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, " + _UPDATE_TENSORS
        + "float lr, float momentum, float dampening, bool nesterov, float weight_decay, "
        "bool decoupled_weight_decay, bool maximize, bool first_step, float max_grad_norm, "
        "str rounding, int seed",
        "()",
        ("params", "momentum_buffers", "deltas"),
    ),
    "adamw_": (
        "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        + _UPDATE_TENSORS
        + "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
        "int step_index, float max_grad_norm, str rounding, int seed",
        "()",
        ("params", "exp_avgs", "exp_avg_sqs", "deltas"),
    ),
    "grad_norm": ("Tensor[] grads", "Tensor", ()),
    "copy_": ("Tensor(a!)[] dsts, Tensor[] srcs", "()", ("dsts",)),
    "undo_restore_": (
        "Tensor(a!)[] params, Tensor[] undo, int[] undo_offsets",
        "()",
        ("params",),
    ),
    "checksum": ("Tensor[] tensors", "Tensor", ()),
}  # fmt: skip


def _implementation(name: str) -> Callable[..., Any]:
    """The function behind ``torch.ops.ttt_fast.<name>``: call the backend, bump versions."""
    argument_names = [
        part.split("=")[0].split()[-1]
        for part in SCHEMAS[name][0].split(",")
        if "*" not in part.split()
    ]
    mutated = SCHEMAS[name][2]

    def run(*args: Any, backend: str, **kwargs: Any) -> Any:
        if backend == "torch":
            result = getattr(reference, name)(*args, **kwargs)
        else:
            result = getattr(getattr(torch.ops, f"ttt_fast_{backend}"), name)(*args, **kwargs)
        named = dict(zip(argument_names, args, strict=False))
        for argument in mutated:
            # Raw-memory writes do not show up in autograd's "modified in place" check by
            # themselves.
            if named[argument] and backend != "torch":
                torch.autograd.graph.increment_version(named[argument])
        return result

    return run


def _register() -> None:
    """Define every op with its schema, implementation and, if it returns nothing, its fake."""
    for name, (arguments, returned, _) in SCHEMAS.items():
        separator = ", " if "*" in arguments else ", *, "
        _LIBRARY.define(f"{name}({arguments}{separator}str backend) -> {returned}")
        _LIBRARY.impl(name, _implementation(name), "CompositeExplicitAutograd")
        if returned == "()":
            torch.library.register_fake(
                f"ttt_fast::{name}", lambda *args, **kwargs: None, lib=_LIBRARY
            )


_register()


@torch.library.register_fake("ttt_fast::grad_norm", lib=_LIBRARY)
def _grad_norm_fake(grads: Sequence[Tensor], *, backend: str) -> Tensor:
    double = any(g.dtype == torch.float64 for g in grads)
    device = grads[0].device if grads else None
    return torch.empty((), dtype=torch.float64 if double else torch.float32, device=device)


@torch.library.register_fake("ttt_fast::checksum", lib=_LIBRARY)
def _checksum_fake(tensors: Sequence[Tensor], *, backend: str) -> Tensor:
    return torch.empty((), dtype=torch.int64)


# ---------------------------------------------------------------------------- checks


def _device_type(tensors: Sequence[Tensor]) -> str:
    return tensors[0].device.type if tensors else "cpu"


def _check_list(op: str, name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """``tensors`` must pair up with ``params`` in number, shape and device."""
    if len(tensors) != len(params):
        raise ValueError(
            f"{op}: got {len(params)} params but {len(tensors)} {name}; give one for each"
            " parameter."
        )
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if tensor.shape != param.shape:
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(tensor.shape)} but params[{i}] has "
                f"{tuple(param.shape)}; they must agree."
            )
        if tensor.device != param.device:
            raise ValueError(
                f"{op}: {name}[{i}] is on {tensor.device} but params[{i}] is on {param.device}; "
                "move it there."
            )


def _check_dtypes(
    op: str, name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], wide: bool
) -> None:
    """Each tensor has its parameter's dtype, or (``wide``) the compute type."""
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        allowed = {param.dtype, compute_dtype(param.dtype)} if wide else {param.dtype}
        if tensor.dtype not in allowed:
            names = " or ".join(sorted(str(d).removeprefix("torch.") for d in allowed))
            raise ValueError(
                f"{op}: {name}[{i}] is {str(tensor.dtype).removeprefix('torch.')}; "
                f"params[{i}] needs {names}. Convert it."
            )


def _check_update(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    deltas: Sequence[Tensor],
    bases: Sequence[Tensor],
    rounding: str,
    undo: UndoLog | None,
) -> None:
    """What sgd_ and adamw_ ask of their tensors."""
    if undo is not None and len(undo.offsets) != len(params):
        raise ValueError(
            f"{op}: the undo log is for {len(undo.offsets)} parameters but got {len(params)}"
            " params; pass those it was made for, or undo.select(their positions)."
        )
    for i, param in enumerate(params):
        if param.dtype not in _DTYPES:
            raise ValueError(
                f"{op}: params[{i}] is {str(param.dtype).removeprefix('torch.')}; supported are"
                " float32, bfloat16, float16 and float64. Leave it out of the selection or cast"
                " the model."
            )
        if param.device != params[0].device:
            raise ValueError(
                f"{op}: params[{i}] is on {param.device} but params[0] is on {params[0].device}; "
                "call the op once for each device."
            )
    _check_list(op, "grads", grads, params)
    _check_dtypes(op, "grads", grads, params, wide=True)
    for name, tensors in states.items():
        _check_list(op, name, tensors, params)
        _check_dtypes(op, name, tensors, params, wide=True)
    if rounding not in ROUNDINGS:
        raise ValueError(
            f"{op}: rounding={rounding!r} is unknown; use one of {', '.join(map(repr, ROUNDINGS))}."
        )
    if len(deltas) == 0 and len(bases) == 0:
        return
    if rounding == "torch":
        raise ValueError(
            f"{op}: rounding='torch' is torch's own update and keeps no deltas; "
            "use rounding='nearest' with deltas."
        )
    _check_list(op, "deltas", deltas, params)
    _check_list(op, "bases", bases, params)
    _check_dtypes(op, "bases", bases, params, wide=False)
    for i, (delta, param) in enumerate(zip(deltas, params, strict=True)):
        if delta.dtype != compute_dtype(param.dtype):
            raise ValueError(
                f"{op}: deltas[{i}] is {str(delta.dtype).removeprefix('torch.')}; it must be "
                f"{str(compute_dtype(param.dtype)).removeprefix('torch.')}."
            )


def _update_backend(params: Sequence[Tensor], rounding: str, backend: str) -> str:
    """rounding="torch" *is* torch's foreach code, so it runs there and nowhere else."""
    chosen = resolve_backend(_device_type(params), backend)
    if rounding != "torch":
        return chosen
    if backend not in ("auto", "torch"):
        raise ValueError(
            f"rounding='torch' runs torch's own operations, backend={backend!r} does not; "
            "use backend='auto', or rounding='nearest'."
        )
    return "torch"


# ---------------------------------------------------------------------------- public ops


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
        backend: "auto", "torch" or "cpp".

    Raises:
        ValueError: lists do not pair up, unsupported dtype or option.
    """
    if momentum and len(momentum_buffers) == 0 and len(params) > 0:
        raise ValueError(f"sgd_: momentum={momentum} needs momentum_buffers; got none.")
    if max_grad_norm is not None and grad_norm is None:
        raise ValueError(
            "sgd_: max_grad_norm needs grad_norm; compute it with ops.grad_norm(grads)."
        )
    states = {"momentum_buffers": momentum_buffers} if momentum else {}
    _check_update("sgd_", params, grads, states, deltas, bases, rounding, undo)
    torch.ops.ttt_fast.sgd_(
        list(params), list(grads), list(momentum_buffers) if momentum else [], list(deltas),
        list(bases), grad_norm, grad_scale, found_inf, landed, undo.tensors if undo else [],
        undo.offsets if undo else [], lr=float(lr), momentum=float(momentum),
        dampening=float(dampening), nesterov=nesterov, weight_decay=float(weight_decay),
        decoupled_weight_decay=decoupled_weight_decay, maximize=maximize, first_step=first_step,
        max_grad_norm=-1.0 if max_grad_norm is None else float(max_grad_norm), rounding=rounding,
        seed=seed, backend=_update_backend(params, rounding, backend),
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
        backend: "auto", "torch" or "cpp".

    Raises:
        ValueError: lists do not pair up, unsupported dtype or option.
    """
    if step_index < 1:
        raise ValueError(f"adamw_: step_index={step_index}; it counts from 1.")
    if max_grad_norm is not None and grad_norm is None:
        raise ValueError(
            "adamw_: max_grad_norm needs grad_norm; compute it with ops.grad_norm(grads)."
        )
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check_update("adamw_", params, grads, states, deltas, bases, rounding, undo)
    torch.ops.ttt_fast.adamw_(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(deltas), list(bases),
        grad_norm, grad_scale, found_inf, landed, undo.tensors if undo else [],
        undo.offsets if undo else [], lr=float(lr), beta1=float(betas[0]), beta2=float(betas[1]),
        eps=float(eps), weight_decay=float(weight_decay), maximize=maximize, step_index=step_index,
        max_grad_norm=-1.0 if max_grad_norm is None else float(max_grad_norm), rounding=rounding,
        seed=seed, backend=_update_backend(params, rounding, backend),
    )  # fmt: skip


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Global norm of a list of gradients: sqrt(Σ g²), in an order that does not depend on threads.

    Args:
        grads: n tensors of any floating dtype; on several devices, their norms are combined on the
            first one's.
        backend: "auto", "torch" or "cpp".

    Returns:
        0-dim float32 tensor on their device (float64 when a gradient is float64); 0 for an empty
        list.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    norms = [
        torch.ops.ttt_fast.grad_norm(local, backend=resolve_backend(device.type, backend))
        for device, local in (by_device or {torch.device("cpu"): []}).items()
    ]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


@torch.no_grad()
def copy_(dsts: Sequence[Tensor], srcs: Sequence[Tensor], *, backend: str = "auto") -> None:
    """Copy every source into its destination, bit for bit.

    Args:
        dsts: n tensors. Mutated.
        srcs: n tensors of the same shapes and dtypes, possibly on another device.
        backend: "auto", "torch" or "cpp".

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
    devices = {tensor.device.type for tensor in [*dsts, *srcs]}
    crossing = len(devices) > 1
    # Between devices only torch can copy; that is what "auto" means there.
    chosen = (
        "torch" if crossing and backend == "auto" else resolve_backend(_device_type(dsts), backend)
    )
    torch.ops.ttt_fast.copy_(list(dsts), list(srcs), backend=chosen)


@torch.no_grad()
def undo_restore_(params: Sequence[Tensor], undo: UndoLog, *, backend: str = "auto") -> None:
    """Write back every logged bit: runs that were kept whole first, then the entries, newest first.

    Args:
        params: the parameters that ``undo`` was made for. Mutated. Untracked ones are left alone.
        undo: the log; it stays as it is, so that restoring again changes nothing.
        backend: "auto", "torch" or "cpp".
    """
    chosen = resolve_backend(_device_type(params), backend)
    torch.ops.ttt_fast.undo_restore_(list(params), undo.tensors, undo.offsets, backend=chosen)


@torch.no_grad()
def checksum(tensors: Sequence[Tensor], *, backend: str = "auto") -> int:
    """64-bit checksum of the bits of all tensors in order (formula: ``reference.checksum``)."""
    chosen = resolve_backend(_device_type(tensors), backend)
    return int(torch.ops.ttt_fast.checksum(list(tensors), backend=chosen))
