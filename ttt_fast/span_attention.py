"""Attention of a span to keys and values before it that are only read.

Torch's attention differentiates all keys and values, repeats them for grouped queries, and wants
them in one tensor. Here those before the span stay where they are: tile by tile, query heads that
share one go through it together, and no gradient for it is formed (2 of 7 products less).

    o = softmax(s q [K₀; k]ᵀ) [V₀; v]      over tiles, with a running maximum
    dS = P ∘ (do [V₀; v]ᵀ − Σ do ∘ o)      dq = s dS [K₀; k]     dk = s dSᵀ q     dv = Pᵀ do
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttt_fast.rounding import compute_dtype

# Scores of one tile: 4 MiB of float32 stay in a CPU's cache; a GPU wants fewer, larger kernels.
SCORES_CPU, SCORES_ELSEWHERE = 2**20, 2**25

# Of one row: keys and values (H_kv, T, D), and how many of the T tokens are before the span.
Past = tuple[Tensor, Tensor, int]


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, past: Sequence[Past], mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of spans to themselves and to what is before each; differentiable in q, k and v.

    Products are in float32 at least.

    Args:
        q: (N, H, t, D), H a multiple of the number of key heads.
        k: (N, H_kv, t, D), of the span.
        v: likewise, (N, H_kv, t, D_v).
        past: of each row; the tokens just before its span.
        mask: (N or 1, H or 1, t, P + t) with P the most tokens before any of the spans, which end
            where the span begins: True, or a number to add, where a token may look. None: at
            itself and all before it.
        scale: of the scores.

    Returns:
        (N, H, t, D_v) in the dtype of q.
    """
    return _SpanAttention.apply(q, k, v, past, mask, scale)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: Sequence[Past],
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        N, H, t, _ = q.shape
        wide = compute_dtype(q.dtype)
        out = q.new_empty(N, H, t, v.shape[-1])
        lse = q.new_empty(N, k.shape[1], H // k.shape[1] * t, 1, dtype=wide)
        for n in range(N):
            rows = _Rows(q, k, n, mask, scale)
            total, mass, peak = 0.0, 0.0, torch.full_like(lse[n], torch.finfo(wide).min)
            for keys, values, allowed in rows.tiles(past[n], k[n], v[n]):
                scores = rows.scores(keys, allowed)
                higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
                P, shrink = scores.sub_(higher).exp_(), (peak - higher).exp_()
                total = shrink * total + P @ values.to(wide)
                mass = shrink * mass + P.sum(-1, keepdim=True)
                peak = higher
            # A token that sees nothing gets 0.
            mass = mass.clamp_(min=torch.finfo(wide).tiny)
            out[n], lse[n] = rows.ungrouped(total / mass), peak + mass.log()
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.past, ctx.scale = past, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for n in range(q.shape[0]):
            rows = _Rows(q, k, n, mask, ctx.scale)
            do_n = rows.grouped(do[n])
            inner = (do_n * rows.grouped(out[n])).sum(-1, keepdim=True)
            dq_n = torch.zeros_like(rows.q)
            for keys, values, allowed in rows.tiles(ctx.past[n], k[n], v[n]):
                P = rows.scores(keys, allowed).sub_(lse[n]).exp_()
                dS = (do_n @ values.to(do_n.dtype).mT).sub_(inner).mul_(P)
                dq_n += dS @ keys.to(dS.dtype)
            # The span's own keys are the last tile; rows.q has the scale.
            dk[n], dv[n] = dS.mT @ rows.q, P.mT @ do_n
            dq[n] = rows.ungrouped(dq_n.mul_(ctx.scale))
        return dq, dk, dv, None, None, None


class _Rows:
    """Queries of one row of a batch, with all that share a key head one below the other."""

    def __init__(self, q: Tensor, k: Tensor, n: int, mask: Tensor | None, scale: float) -> None:
        self._heads, self._groups, self._t = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
        self._mask = None if mask is None else mask[n if mask.shape[0] > 1 else 0]
        self.q = self.grouped(q[n]) * scale
        many = SCORES_CPU if q.device.type == "cpu" else SCORES_ELSEWHERE
        self._tile = max(16, many // (q.shape[1] * self._t))

    def grouped(self, x: Tensor) -> Tensor:
        """(H, t, D) as (H_kv, H / H_kv · t, D), in float32 at least."""
        x = x.reshape(self._heads, self._groups * self._t, x.shape[-1])
        return x.to(compute_dtype(x.dtype))

    def ungrouped(self, x: Tensor) -> Tensor:
        """The other way."""
        return x.reshape(self._heads * self._groups, self._t, x.shape[-1])

    def tiles(
        self, past: Past, k: Tensor, v: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Keys, values and the mask of each tile: those of before, and the span as the last."""
        keys, values, length = past
        for start in range(0, length, self._tile):
            stop = min(start + self._tile, length)
            allowed = self._allowed(start - length - self._t, stop - length - self._t)
            # To look costs a CPU 1 / heads of the scores, and windows see few tiles; a GPU waits.
            if allowed is not None and allowed.dtype == torch.bool and not allowed.is_cuda:
                if not allowed.any():
                    continue
                allowed = None if allowed.all() else allowed
            yield keys[:, start:stop], values[:, start:stop], allowed
        yield k, v, self._allowed(-self._t, None)

    def scores(self, keys: Tensor, allowed: Tensor | None) -> Tensor:
        """(H_kv, rows, tokens), −∞ where a token may not look."""
        scores = self.q @ keys.to(self.q.dtype).mT
        if allowed is not None:
            apart = scores.view(self._heads, self._groups, self._t, -1)
            if allowed.shape[0] > 1:
                allowed = allowed.reshape(self._heads, self._groups, self._t, -1)
            if allowed.dtype == torch.bool:
                apart.masked_fill_(~allowed, -torch.inf)
            else:
                apart.add_(allowed)
        return scores

    def _allowed(self, start: int, stop: int | None) -> Tensor | None:
        """The mask of columns that are counted from the end, (H or 1, t, columns)."""
        if self._mask is not None:
            return self._mask[..., start:stop]
        if stop is not None:
            return None
        ones = torch.ones(self._t, self._t, dtype=torch.bool, device=self.q.device)
        return ones.tril()[None]
