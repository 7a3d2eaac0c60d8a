"""What the ops ask of their arguments: errors with names, before a kernel sees plain memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_fast.rounding import compute_dtype
from ttt_fast.undo import UndoLog

ROUNDINGS = ("nearest", "stochastic", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COEFFICIENTS = (torch.float32, torch.float64)


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


def check_update(
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
        if param.dtype not in DTYPES:
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


def check_factors(
    op: str,
    lead: Tensor,
    tensors: Sequence[tuple[str, Tensor, tuple[str, ...], tuple[torch.dtype, ...]]],
    sizes: dict[str, int],
) -> None:
    """Check tensors given as (name, tensor, names of its axes, dtypes).

    An axis has one size everywhere, that of ``sizes`` or of the first tensor that has it. All are
    on the device of ``lead``; no dtypes: that of ``lead``.
    """
    device, dtype = lead.device, lead.dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"{op}: tensors of {str(dtype).removeprefix('torch.')} are not supported; float32, "
            "bfloat16, float16 and float64 are. Convert them."
        )
    for name, tensor, axes, dtypes in tensors:
        shape = tensor.shape
        known = dict(sizes)
        fits = len(shape) == len(axes)
        for axis, size in zip(axes, shape, strict=False):
            fits = fits and sizes.setdefault(axis, size) == size
        if not fits:
            said = ", ".join(f"{axis} = {known[axis]}" for axis in axes if axis in known)
            raise ValueError(
                f"{op}: {name} has shape {tuple(shape)}; it must be ({', '.join(axes)})"
                f"{' with ' if said else ''}{said}."
            )
        if tensor.dtype != dtype if not dtypes else tensor.dtype not in dtypes:
            allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes or (dtype,))
            raise ValueError(
                f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {allowed}."
                " Convert it."
            )
        if tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, other tensors on {device}; move it there."
            )


def with_rows(x: Tensor | None) -> Tensor | None:
    """Return x, its rows consecutive."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def check_momentum(
    op: str, momentum: float, momentum_buffers: Sequence[Tensor], params: Sequence[Tensor]
) -> None:
    """Momentum needs buffers."""
    if momentum and len(momentum_buffers) == 0 and len(params) > 0:
        raise ValueError(f"{op}: momentum={momentum} needs momentum_buffers; got none.")


def check_clip(op: str, max_grad_norm: float | None, grad_norm: Tensor | None, source: str) -> None:
    """Clipping needs the norm, which ``source`` computes."""
    if max_grad_norm is not None and grad_norm is None:
        raise ValueError(f"{op}: max_grad_norm needs grad_norm; compute it with {source}.")


def check_own_rounding(op: str, rounding: str) -> None:
    """What has no counterpart in torch cannot round as torch does."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{op}: rounding={rounding!r} is unknown; use 'nearest' or 'stochastic'.")


def check_matrix(op: str, name: str, weight: Tensor) -> None:
    """A weight is a matrix, or slices of a fused projection."""
    if weight.dim() not in (2, 3):
        raise ValueError(
            f"{op}: {name} has shape {tuple(weight.shape)}; it must be (out, in) or (k, out / k,"
            " in)."
        )


def check_pairs(
    op: str, params: Sequence[Tensor], xs: Sequence[Tensor], dys: Sequence[Tensor]
) -> None:
    """Each weight (out, in), or (k, out / k, in), must have an x (R, in) and a dy (R, out)."""
    if not len(params) == len(xs) == len(dys):
        raise ValueError(
            f"{op}: got {len(params)} params, {len(xs)} xs and {len(dys)} dys; give one of each for"
            " every weight."
        )
    for i, (param, x, dy) in enumerate(zip(params, xs, dys, strict=True)):
        check_matrix(op, f"params[{i}]", param)
        factors = [(f"xs[{i}]", x, ("R", "in"), ()), (f"dys[{i}]", dy, ("R", "out"), ())]
        sizes = {"out": param.shape[:-1].numel(), "in": param.shape[-1]}
        check_factors(op, param, factors, sizes)
