"""Inner products of the gradients of a session's steps, from factors: norms and angles of deltas.

A delta ΔW = (ρ − 1)·W₀ − Σ_s β_s G_s has the norm

    ‖ΔW‖² = Σ_st β_s β_t ⟨G_s, G_t⟩ + (ρ − 1)²·‖W₀‖² − 2·(ρ − 1)·Σ_s β_s ⟨W₀, G_s⟩

so that after the products, which do not depend on the coefficients, it costs nothing at any step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ttt_fast import ops
from ttt_fast.engines.deltas import (
    linear_rows,
    lookup_rows,
    selected_outputs,
    vector_rows,
)
from ttt_fast.engines.factors import Factors, Track, VectorFactors, of_track
from ttt_fast.rounding import compute_dtype

# Rows of tokens whose products with others are held at a time, (rows, R) twice. Fewer leave out
# more of a symmetric matrix's other half, and are slower products.
_GRAM_ROWS = 128
# Elements of a weight that are taken at a time.
_BLOCK_ELEMENTS = 1 << 20


class InnerProducts:
    """Of the gradients of every two steps, and of each with W₀: computed when first asked for.

    Args:
        factors: of all parameters.
        tracks: their coefficients.
        steps: for each delta, the steps of the session in which it took part, ascending, (K,).
    """

    def __init__(
        self, factors: Sequence[Factors], tracks: Sequence[Track], steps: Sequence[Tensor]
    ) -> None:
        self._factors, self._tracks, self._steps = factors, tracks, steps
        self._of_gradients: list[list[Tensor]] = []
        self._with_base: list[list[tuple[Tensor, Tensor]]] = []

    @property
    def need_base(self) -> bool:
        """Whether :meth:`delta_norm` still has to read W₀: where weights have decayed."""
        return not self._with_base and any(map(_decayed, self._tracks))

    def delta_norm(self) -> Tensor:
        """‖ΔW‖ of each delta over all parameters with the coefficients of now, (D,) float64."""
        squares = torch.zeros(len(self._steps), dtype=torch.float64)
        with_base = self._base_products() if any(map(_decayed, self._tracks)) else None
        for i, track in enumerate(self._tracks):
            for delta, own in enumerate(self._steps):
                beta = track.coefficients.beta[delta][own]
                square = beta @ self._gradient_products()[i][delta] @ beta
                if with_base is not None:
                    drop = track.coefficients.rho[delta] - 1.0
                    inner, base = with_base[i][delta]
                    square = square + drop * (drop * base - 2 * (beta @ inner))
                squares[delta] += square.cpu()
        return squares.clamp_(min=0).sqrt_()

    def cosine(self, delta: int, s: int, t: int) -> Tensor:
        """Cosine between the gradients of two of a delta's own steps; NaN if one is zero."""
        total = sum(products[delta] for products in self._gradient_products())
        return total[s, t] / (total[s, s] * total[t, t]).sqrt()

    def _gradient_products(self) -> list[list[Tensor]]:
        """⟨G_s, G_t⟩ summed over the parameters of each track, for each delta: (K, K)."""
        if not self._of_gradients:
            self._of_gradients = [
                [
                    sum(gradient_products(each, delta, own) for each in self._of(track))
                    for delta, own in enumerate(self._steps)
                ]
                for track in self._tracks
            ]
        return self._of_gradients

    def _base_products(self) -> list[list[tuple[Tensor, Tensor]]]:
        """⟨W₀, G_s⟩, (K,), and ‖W₀‖², summed and arranged likewise; zeros where nothing decays."""
        if not self._with_base:
            self._with_base = [
                [
                    _base_products_of(self._of(track) if track.decays else [], delta, own)
                    for delta, own in enumerate(self._steps)
                ]
                for track in self._tracks
            ]
        return self._with_base

    def _of(self, track: Track) -> list[Factors]:
        return of_track(self._factors, track)


def _decayed(track: Track) -> bool:
    return track.decays and bool((track.coefficients.rho != 1).any())


def _base_products_of(members: Sequence[Factors], delta: int, own: Tensor) -> tuple[Tensor, Tensor]:
    inner = torch.zeros_like(own, dtype=torch.float64)
    square = inner.new_zeros(())
    for factors in members:
        products, base = base_products(factors, delta, own)
        inner, square = inner + products, square + base
    return inner, square


@torch.no_grad()
def gradient_products(factors: Factors, delta: int, own: Tensor) -> Tensor:
    """⟨G_s, G_t⟩ of every two steps of a delta, (K, K) float64, from Grams:  Σ (dY dYᵀ)∘(X Xᵀ).

    A tied weight adds Σ (dE dEᵀ)∘[x_i = x_j] and, between its uses, dY[i, x_j]·⟨X_i, dE_j⟩.

    Args:
        factors: of one parameter.
        delta: which delta.
        own: the K steps of the session in which the delta took part, ascending.
    """
    total = torch.zeros(own.numel(), own.numel(), dtype=torch.float64, device=own.device)
    if isinstance(factors, VectorFactors):
        grads, steps = vector_rows(factors, delta)
        grads = grads.double()
        return total.index_put_(_pairs(own, steps), grads @ grads.t(), accumulate=True)
    wide = compute_dtype(factors.weight.dtype)
    x, dy, steps = linear_rows(factors, delta)
    ids, e, lookup_steps = lookup_rows(factors, delta)
    x, dy, e = x.to(wide), dy.to(wide), e.to(wide)
    # What stands on one side of the diagonal only.
    half = torch.zeros_like(total)
    for rows, before in _chunks(x.shape[0]):
        for columns, sums in ((before, half), (rows, total)):
            pairs = (x[rows] @ x[columns].t()) * (dy[rows] @ dy[columns].t())
            _add_by_step(sums, pairs, own, steps[rows], steps[columns])
        if ids.numel():
            pairs = (x[rows] @ e.t()) * dy[rows][:, ids]
            _add_by_step(half, pairs, own, steps[rows], lookup_steps)
    for rows, before in _chunks(ids.numel()):
        for columns, sums in ((before, half), (rows, total)):
            pairs = (e[rows] @ e[columns].t()) * (ids[rows, None] == ids[columns])
            _add_by_step(sums, pairs, own, lookup_steps[rows], lookup_steps[columns])
    return total + half + half.t()


@torch.no_grad()
def base_products(factors: Factors, delta: int, own: Tensor) -> tuple[Tensor, float]:
    """⟨W₀, G_s⟩ of every step of a delta, (K,) float64, and ‖W₀‖² of the selected part.

    Σ over tokens of (dY W₀)∘X and of dE∘W₀[x].
    """
    total = torch.zeros(own.numel(), dtype=torch.float64, device=own.device)
    square = float(ops.grad_norm([factors.selection.view()]).double().square())
    if isinstance(factors, VectorFactors):
        grads, steps = vector_rows(factors, delta)
        base = factors.selection.view(factors.base).flatten()
        products = (grads * base).double().sum(1)
        return total.index_add_(0, torch.searchsorted(own, steps), products), square
    wide = compute_dtype(factors.weight.dtype)
    x, dy, steps = linear_rows(factors, delta)
    x, dy = x.to(wide), dy.to(wide)
    weight = selected_outputs(factors, factors.weight)
    weight = weight if weight.dim() == 3 else weight[None]
    first = 0
    for group in weight:
        for block in group.split(max(1, _BLOCK_ELEMENTS // max(1, group.shape[1]))):
            part = dy[:, first : first + block.shape[0]] @ block.to(wide)
            products = (part * x).double().sum(1)
            total.index_add_(0, torch.searchsorted(own, steps), products)
            first += block.shape[0]
    ids, e, steps = lookup_rows(factors, delta)
    products = (e.to(wide) * factors.weight[ids].to(wide)).double().sum(1)
    return total.index_add_(0, torch.searchsorted(own, steps), products), square


def _chunks(n_rows: int) -> Iterator[tuple[slice, slice]]:
    """Some rows at a time, and those before them."""
    for first in range(0, n_rows, _GRAM_ROWS):
        yield slice(first, first + _GRAM_ROWS), slice(0, first)


def _pairs(own: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.searchsorted(own, steps)
    return place[:, None].expand(-1, place.numel()), place.expand(place.numel(), -1)


def _add_by_step(total: Tensor, pairs: Tensor, own: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Sum the products of pairs of tokens (m, R) into those of their steps, (K, K)."""
    by_column = torch.zeros(pairs.shape[0], own.numel(), dtype=torch.float64, device=own.device)
    by_column.index_add_(1, torch.searchsorted(own, columns), pairs.double())
    total.index_add_(0, torch.searchsorted(own, rows), by_column)
