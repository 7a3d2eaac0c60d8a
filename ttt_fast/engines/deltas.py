"""From factors to weights: adapted ones, and changes of low rank. Nothing here runs the model.

A delta's weight after its steps is W = ρ·W₀ − Σ_s β_s G_s, with G_s = dY_sᵀ X_s where the weight is
linear, and dE_t added to row x_t for each token t where it is an embedding; one that is both (tied)
has both. Everything is computed from rows of tokens or in blocks of rows of W: no matrix of the
weight's size is formed beside the one that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ttt_fast import ops
from ttt_fast.engines.factors import Factors, MatrixFactors, VectorFactors
from ttt_fast.engines.rows import Rows
from ttt_fast.rounding import compute_dtype, random_bits, round_stochastic
from ttt_fast.sgd import Coefficients

# Elements of a weight that are taken at a time.
_BLOCK_ELEMENTS = 1 << 20


class Trajectory:
    """Coefficients of a session that is over; shows those after any number of its steps.

    Stands where :class:`ttt_fast.sgd.Coefficients` stood during the session.

    Args:
        weights: (S + 1, D, 1 + S) float64: entry t is (ρ, −β) of every delta after t steps.

    Attributes:
        weights: likewise.
        rho: (D,) of the steps that are shown, at first the last one.
        beta: (D, S) likewise.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.show([weights.shape[0] - 1] * weights.shape[1])

    @classmethod
    def of(cls, coefficients: Coefficients) -> Trajectory:
        """The trajectory of a session's coefficients."""
        n_steps = coefficients.beta.shape[1]
        rows = [coefficients.at(step) for step in range(n_steps + 1)]
        return cls(torch.stack([torch.cat([rho[:, None], -beta], 1) for rho, beta in rows]))

    def show(self, steps: Sequence[int]) -> None:
        """Show each delta's coefficients after its number of the session's steps."""
        index = torch.tensor(steps, device=self.weights.device)
        chosen = self.weights[index, torch.arange(len(steps), device=self.weights.device)]
        self.rho, self.beta = chosen[:, 0], -chosen[:, 1:]


# ---------------------------------------------------------------------------- rows of one delta


def linear_rows(matrix: MatrixFactors, delta: int) -> tuple[Tensor, Tensor, Tensor]:
    """X (R, in), dY (R, out) and the step (R,) of each row, of the linear uses; views."""
    inputs = matrix.inputs
    if inputs is None:
        n_in = matrix.weight.shape[1]
        none = matrix.weight.new_empty(0, n_in), matrix.weight.new_empty(0, matrix.dy.width)
        return *none, torch.empty(0, dtype=torch.int64, device=matrix.weight.device)
    count, span = inputs.rows.lengths[delta], slice(delta, delta + 1)
    steps = inputs.rows.columns(matrix.weight.device)[delta, :count]
    return inputs.buffer.first(span, count)[0], matrix.dy.first(span, count)[0], steps


def lookup_rows(matrix: MatrixFactors, delta: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (L,), dE (L, in) and the step (L,) of each row, of the lookups; views."""
    lookups = matrix.lookups
    if lookups is None:
        none = torch.empty(0, dtype=torch.int64, device=matrix.weight.device)
        return none, matrix.weight.new_empty(0, matrix.weight.shape[1]), none
    count, span = lookups.rows.lengths[delta], slice(delta, delta + 1)
    steps = lookups.rows.columns(matrix.weight.device)[delta, :count]
    return lookups.ids.first(span, count)[0, :, 0], lookups.dy.first(span, count)[0], steps


def vector_rows(vector: VectorFactors, delta: int) -> tuple[Tensor, Tensor]:
    """Gradients (R, size) and the step (R,) of each, of a bias or a norm's weight; views."""
    count, span = vector.rows.lengths[delta], slice(delta, delta + 1)
    steps = vector.rows.columns(vector.base.device)[delta, :count]
    return vector.grads.first(span, count)[0], steps


def rank(factors: Sequence[Factors], delta: int) -> int:
    """Most rows that a weight's delta has: no delta's rank is higher."""
    return max(sum(rows.lengths[delta] for rows in rows_of(each)) for each in factors)


def rows_of(factors: Factors) -> list[Rows]:
    """Which steps the rows belong to, of every use of a parameter."""
    if isinstance(factors, VectorFactors):
        return [factors.rows]
    return [use.rows for use in (factors.inputs, factors.lookups) if use is not None]


def _terms(factors: Factors, delta: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """Rows of which the last are their steps -> the same with β in the compute type instead.

    What lies behind the last row with a coefficient (steps that were rewound) is left out.
    """
    *rows, steps = rows
    beta = factors.track.coefficients.beta[delta][steps]
    used = beta.nonzero()
    count = int(used[-1]) + 1 if used.numel() else 0
    wide = compute_dtype(factors.selection.param.dtype)
    return *(each[:count] for each in rows), beta[:count].to(wide)


def _rho(factors: Factors, delta: int) -> float:
    return float(factors.track.coefficients.rho[delta]) if factors.track.decays else 1.0


def as_matrix(matrix: MatrixFactors, tensor: Tensor) -> Tensor:
    """The selected part of a tensor of the parameter's shape: (out, in) or (n, out / n, in)."""
    weight, param = matrix.weight, matrix.selection.param
    view = matrix.selection.view(tensor)
    # A Conv1D stores (in, out).
    as_stored = (weight.shape, weight.stride()) == (param.shape, param.stride())
    return view if as_stored else view.movedim(0, -1)


# ---------------------------------------------------------------------------- adapted weights


@torch.no_grad()
def adapt_(
    target: Tensor, factors: Factors, delta: int, rounding: str = "nearest", seed: int = 0
) -> None:
    """W₀ ← round(ρ·W₀ − Σ β_s G_s) on the selected part of a tensor that holds W₀.

    Sums are in the compute type and rounded once. Where nothing is to be added, no bit changes.

    Args:
        target: of the parameter's shape and dtype. Mutated.
        factors: of the parameter.
        delta: which delta.
        rounding: "nearest" or "stochastic".
        seed: of the random bits.
    """
    if isinstance(factors, VectorFactors):
        view = factors.selection.view(target)
        view.copy_(_rounded(_vector(factors, delta, view), target.dtype, rounding, seed))
        return
    rho = _rho(factors, delta)
    weight = as_matrix(factors, target)
    x, dy, beta = _terms(factors, delta, *linear_rows(factors, delta))
    ids, e, e_beta = _terms(factors, delta, *lookup_rows(factors, delta))
    ids, place = ids.unique(return_inverse=True)
    rows = None
    if ids.numel():
        # Rows with both uses are rounded once, so they are taken from W₀ as it was.
        rows = weight[ids].to(beta.dtype) * rho
        if beta.numel():
            rows.addmm_(dy[:, ids].to(beta.dtype).t(), x.to(beta.dtype) * beta[:, None], alpha=-1)
        rows.index_add_(0, place, e.to(beta.dtype) * e_beta[:, None], alpha=-1)
    if beta.numel() or rho != 1.0:
        ops.rank_update_(weight, x, dy, -beta, scale=rho, rounding=rounding, seed=seed)
    if rows is not None:
        weight[ids] = _rounded(rows, target.dtype, rounding, seed, stream=1)


def _vector(vector: VectorFactors, delta: int, base: Tensor) -> Tensor:
    """ρ·w₀ − Σ β_s g_s of the selected part, given w₀, in the compute type."""
    grads, beta = _terms(vector, delta, *vector_rows(vector, delta))
    return base.to(beta.dtype) * _rho(vector, delta) - (beta @ grads).view(base.shape)


@torch.no_grad()
def vector_change(vector: VectorFactors, delta: int) -> Tensor:
    """Δw of a whole bias or norm weight, (size,) in the compute type."""
    change = torch.zeros_like(vector.base)
    base = vector.selection.view().to(change.dtype)
    vector.selection.view(change).copy_(_vector(vector, delta, base) - base)
    return change


@torch.no_grad()
def squared_rounding(vector: VectorFactors, delta: int) -> tuple[float, float]:
    """‖round(w) − w‖² in the parameter's type, and ‖w − w₀‖²; summed in float64."""
    base = vector.selection.view()
    exact = _vector(vector, delta, base)
    lost = exact.to(base.dtype).double() - exact.double()
    return float(lost.square().sum()), float((exact - base).double().square().sum())


def _rounded(
    values: Tensor, dtype: torch.dtype, rounding: str, seed: int, stream: int = 0
) -> Tensor:
    if rounding == "nearest":
        return values.to(dtype)
    bits = random_bits(seed, stream, values.numel(), values.device)
    return round_stochastic(values, dtype, bits)


# ---------------------------------------------------------------------------- low rank


@torch.no_grad()
def low_rank(matrix: MatrixFactors, delta: int, rank: int) -> tuple[Tensor, Tensor]:
    """The best B (out, r) and A (r, in) with B A ≈ −Σ β_s G_s, r ≤ rank, in the compute type.

    Orthonormal bases of both sides and an SVD of the small core between them; the decay of W₀ has
    full rank and is left out. Outputs that are not selected have rows of zeros.
    """
    left, right = _sides(matrix, delta)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.t())
    u, s, vh = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    kept = min(rank, s.numel())
    root = s[:kept].sqrt()
    return q_left @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ q_right.t()


def _sides(matrix: MatrixFactors, delta: int) -> tuple[Tensor, Tensor]:
    """Factors of −Σ β_s G_s over all outputs: (out, R) and (R, in)."""
    x, dy, beta = _terms(matrix, delta, *linear_rows(matrix, delta))
    left = beta.new_zeros(matrix.weight.shape[0], beta.numel())
    target = selected_outputs(matrix, left)
    target.copy_(dy.t().reshape(target.shape))
    right = x * -beta[:, None]
    ids, e, beta = _terms(matrix, delta, *lookup_rows(matrix, delta))
    if ids.numel() == 0:
        return left, right
    ids, place = ids.unique(return_inverse=True)
    ones = beta.new_zeros(left.shape[0], ids.numel())
    ones[ids, torch.arange(ids.numel(), device=ids.device)] = 1
    sums = beta.new_zeros(ids.numel(), e.shape[1])
    sums.index_add_(0, place, e * beta[:, None], alpha=-1)
    return torch.cat([left, ones], 1), torch.cat([right, sums])


def selected_outputs(matrix: MatrixFactors, tensor: Tensor) -> Tensor:
    """The selected rows of a tensor (out, ...): itself, or a view (n, out / n, ...)."""
    rows = matrix.selection.rows
    if rows is None:
        return tensor
    return replace(rows, dim=0).view(tensor)


@torch.no_grad()
def squared_error(matrix: MatrixFactors, delta: int, b: Tensor, a: Tensor) -> tuple[float, float]:
    """‖ΔW − B A‖² and ‖ΔW‖², ΔW = (ρ − 1)·W₀ − Σ β_s G_s with the decay; summed in float64."""
    error = square = 0.0
    for rows, change in _changes(matrix, delta):
        square += float(change.double().square().sum())
        error += float((change - b[rows] @ a).double().square().sum())
    return error, square


def _changes(matrix: MatrixFactors, delta: int) -> Iterator[tuple[slice, Tensor]]:
    """ΔW in blocks of rows (slice, (rows, in)), in the compute type."""
    weight, rho = matrix.weight, _rho(matrix, delta)
    left, right = _sides(matrix, delta)
    decay = torch.zeros(weight.shape[0], 1, dtype=left.dtype, device=left.device)
    selected_outputs(matrix, decay).fill_(rho - 1.0)
    step = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], step):
        rows = slice(first, min(first + step, weight.shape[0]))
        change = left[rows] @ right
        if rho != 1.0:
            change += decay[rows] * weight[rows].to(left.dtype)
        yield rows, change
