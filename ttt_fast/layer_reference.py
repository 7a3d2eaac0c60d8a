"""The pieces of a model's layers in plain torch: norms, linears, gated units, rotary, attention.

What :mod:`ttt_fast.reference` says of arithmetic holds here; callers find these functions there,
too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_fast.rounding import compute_dtype

# ---------------------------------------------------------------------------- rms_norm


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """See :func:`ttt_fast.ops.rms_norm`."""
    wide = x.to(compute_dtype(x.dtype))
    rstd = 1.0 / (wide.square().mean(-1) + eps).sqrt()
    normalised = _rounded(wide * rstd[..., None], x.dtype, round_first)
    return (normalised * weight[:, None]).to(x.dtype), rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, round_first: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`ttt_fast.ops.rms_norm_backward`."""
    wide, factor = dy.to(rstd.dtype), rstd[..., None]
    normalised = x.to(rstd.dtype) * factor
    g = wide * weight[:, None]
    dx = (g - normalised * (g * normalised).mean(-1, keepdim=True)) * factor
    return dx.to(x.dtype), (wide * _rounded(normalised, x.dtype, round_first)).sum(1)


def _rounded(normalised: Tensor, dtype: torch.dtype, round_first: bool) -> Tensor:
    return normalised.to(dtype).to(normalised.dtype) if round_first else normalised


# ---------------------------------------------------------------------------- linears


def linears(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """See :func:`ttt_fast.ops.linears`."""
    wide = compute_dtype(x.dtype)
    return [F.linear(x.to(wide), weight.to(wide)).to(x.dtype) for weight in weights]


def linears_backward(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """See :func:`ttt_fast.ops.linears_backward`."""
    wide = compute_dtype(dys[0].dtype)
    terms = (dy.to(wide) @ weight.to(wide) for dy, weight in zip(dys, weights, strict=True))
    return sum(terms).to(dys[0].dtype)


# ---------------------------------------------------------------------------- glu


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    s = torch.sigmoid(x)
    # 1 − s has few digits left where s is nearly 1.
    return x * s, s + x * (s * torch.sigmoid(-x))


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """x·s(u) with u = 2·sqrt(2/π)·(x + 0.044715·x³): (1 + tanh z) / 2 is s(2z)."""
    scale = 1.5957691216057308
    u = scale * (x + 0.044715 * (x * x * x))
    s, slope = torch.sigmoid(u), scale * (1.0 + 3.0 * 0.044715 * (x * x))
    return x * s, s + x * (s * torch.sigmoid(-u)) * slope


GLU_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}


def glu(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """See :func:`ttt_fast.ops.glu`."""
    wide = compute_dtype(gate.dtype)
    act, _ = GLU_ACTIVATIONS[activation](gate.to(wide))
    return (act.to(gate.dtype).to(wide) * up.to(wide)).to(gate.dtype)


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, *, activation: str) -> tuple[Tensor, Tensor]:
    """See :func:`ttt_fast.ops.glu_backward`."""
    wide = compute_dtype(gate.dtype)
    act, derivative = GLU_ACTIVATIONS[activation](gate.to(wide))
    dgate = dy.to(wide) * up.to(wide) * derivative
    return dgate.to(gate.dtype), (dy.to(wide) * act.to(gate.dtype).to(wide)).to(gate.dtype)


# ---------------------------------------------------------------------------- rotary


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool = False) -> Tensor:
    """See :func:`ttt_fast.ops.rotary`."""
    wide, turned = compute_dtype(x.dtype), cos.shape[-1]
    half = turned // 2
    c, s = cos.to(wide)[:, None], sin.to(wide)[:, None]
    if transposed:
        s = -s.roll(half, -1)
    parts = x[..., :turned].to(wide)
    partners = torch.cat((-parts[..., half:], parts[..., :half]), -1)
    y = torch.empty_like(x)
    y[..., :turned] = _rounded(parts * c, cos.dtype, True) + _rounded(partners * s, cos.dtype, True)
    y[..., turned:] = x[..., turned:]
    return y


# ---------------------------------------------------------------------------- attention


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ttt_fast.ops.attention_backward`."""
    wide, group = compute_dtype(q.dtype), q.shape[1] // k.shape[1]
    dy, q = dy.to(wide), q.to(wide)
    keys, values = (x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    scores = scale * (q @ keys.mT)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(wide)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    # Who attends to nothing has probabilities 0.
    alone = (scores == -torch.inf).all(-1, keepdim=True)
    p = scores.softmax(-1).masked_fill(alone, 0)
    dp = dy @ values.mT
    dscores = scale * (p * (dp - (p * dp).sum(-1, keepdim=True)))
    by_head = dscores @ keys, dscores.mT @ q, p.mT @ dy
    shapes = q.shape, k.shape, v.shape
    return tuple(
        _as_projections_have_it(x.unflatten(1, (shape[1], -1)).sum(2), k.dtype)
        for x, shape in zip(by_head, shapes, strict=True)
    )


def _as_projections_have_it(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads (B, H, T, D) in the order of memory of (B, T, H, D)."""
    return x.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)
