"""The ops on a gradient that is kept as its factors, G = dYᵀ X: norms, products, sums.

What :mod:`ttt_fast.ops` says of its tensors holds here; callers find these ops there, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_fast.dispatch import choose, choose_but_float16
from ttt_fast.op_checks import COEFFICIENTS, DTYPES, check_factors, check_matrix, check_own_rounding
from ttt_fast.rounding import compute_dtype


def gram_norm(x: Tensor, dy: Tensor, *, backend: str = "auto") -> Tensor:
    """Squared Frobenius norm of dyᵀ x for each delta, without forming it:  Σ (x xᵀ) ∘ (dy dyᵀ).

    The "ghost norm" of Goodfellow (2015) and Li et al. (2022). All products are in the compute
    type, whatever the storage. Tokens that do not count (padding) must be rows of zeros. Not
    differentiable.

    Args:
        x: layer inputs, (B, M, in).
        dy: gradients at the layer's output, (B, M, out), same dtype and device.
        backend: "auto", "torch", "cpp", "triton" or "cuda".

    Returns:
        (B,) float32, or float64 for float64; never negative.

    Raises:
        ValueError: shapes, dtypes or devices do not agree.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return gram_norm(x, dy, backend=backend)
    tensors = [("x", x, ("B", "M", "in"), ()), ("dy", dy, ("B", "M", "out"), ())]
    check_factors("gram_norm", x, tensors, {})
    return torch.ops.ttt_fast.gram_norm(x, dy, backend=choose("gram_norm", x.device.type, backend))


def gram_norms(xs: Sequence[Tensor], dys: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """:func:`gram_norm` of several pairs, such as all layers of a step, together.

    On a CUDA device one launch for all, or two where a pair has many tokens.

    Args:
        xs: P ≥ 1 layer inputs, (B, M, in); B, M, dtype and device are those of all.
        dys: P gradients at the layers' outputs, (B, M, out), likewise.
        backend: "auto", "torch", "cpp", "triton" or "cuda".

    Returns:
        (P, B) float32, or float64 for float64; never negative.

    Raises:
        ValueError: no pairs, lists that do not pair up, or shapes, dtypes or devices do not agree.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return gram_norms(xs, dys, backend=backend)
    if len(xs) != len(dys) or len(xs) == 0:
        raise ValueError(
            f"gram_norms: got {len(xs)} xs and {len(dys)} dys; give one or more pairs of them."
        )
    # Runs for all layers in every step: in full only to say what is wrong.
    lead, sizes = xs[0], {}
    kind = lead.shape[:2], lead.dtype, lead.device
    alike = lead.dtype in DTYPES and all(
        t.dim() == 3 and (t.shape[:2], t.dtype, t.device) == kind for t in (*xs, *dys)
    )
    for i, (x, dy) in enumerate(zip(xs, dys, strict=True)) if not alike else ():
        pair = [(f"xs[{i}]", x, ("B", "M", "in"), ()), (f"dys[{i}]", dy, ("B", "M", "out"), ())]
        check_factors("gram_norms", lead, pair, sizes)
        sizes = {axis: sizes[axis] for axis in ("B", "M")}
    chosen = choose("gram_norms", lead.device.type, backend)
    return torch.ops.ttt_fast.gram_norms(list(xs), list(dys), backend=chosen)


def delta_linear(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    d: Tensor,
    beta: Tensor,
    rho: Tensor | None = None,
    append: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Apply a linear layer whose weight is ρ W₀ − Σ_r β_r d_r a_rᵀ, another one for each delta.

        y = ρ · x Wᵀ − ((x aᵀ) ∘ β) d

    The gradient at its input is the same op with Wᵀ for W and a, d swapped:
    ``delta_linear(dy, weight.t(), d, a, beta, rho)``. Everything is in the compute type and y is
    rounded once, so that a delta below the rounding of x Wᵀ is not lost. In C++ x Wᵀ is made as
    :func:`linears` makes it. Not differentiable.

    Args:
        x: inputs, (B, M, in).
        weight: (out, in), may be a transposed view; shared by all deltas. None for 0: the delta
            alone.
        a: inputs of earlier steps, (B, R, in); may be the first R rows of larger buffers (copied
            only in 16 bits on a CPU where B > 1). R may be 0.
        d: their gradients at the output, (B, R, out), likewise.
        beta: coefficient of each row of ``a``, (B, R), float32 or float64.
        rho: factor of ``weight``, (B,) float32 or float64; None for 1.
        append: written with x, (B, M, in): where the rows lie that ``a`` is to have next time, as
            those behind ``a`` in its buffer. No row of it may be one of x, ``a`` or ``d``.
        backend: "auto", "torch", "cpp" (all but float16) or "triton".

    Returns:
        (B, M, out), in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not agree.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():
            return delta_linear(x, weight, a, d, beta, rho, append, backend=backend)
    tensors = [
        ("x", x, ("B", "M", "in"), ()),
        ("a", a, ("B", "R", "in"), ()),
        ("d", d, ("B", "R", "out"), ()),
        ("beta", beta, ("B", "R"), COEFFICIENTS),
    ]
    if weight is not None:
        tensors.insert(1, ("weight", weight, ("out", "in"), ()))
    if rho is not None:
        tensors.append(("rho", rho, ("B",), COEFFICIENTS))
    if append is not None:
        tensors.append(("append", append, ("B", "M", "in"), ()))
    check_factors("delta_linear", x, tensors, {})
    chosen = choose_but_float16("delta_linear", x, backend)
    wide = compute_dtype(x.dtype)
    if weight is not None and 1 not in weight.stride():
        weight = weight.contiguous()
    a, d = (t if t.stride(2) == 1 else t.contiguous() for t in (a, d))
    beta = beta.to(wide).contiguous()
    rho = None if rho is None else rho.to(wide).contiguous()
    if append is not None and append.stride(2) != 1 and append.shape[2] > 1:
        raise ValueError(
            f"delta_linear: append has strides {append.stride()}; the entries of a row must lie"
            " side by side. Give rows of a (B, rows, in) buffer."
        )
    return torch.ops.ttt_fast.delta_linear(
        x.contiguous(), weight, a, d, beta, rho, append, backend=chosen
    )


@torch.no_grad()
def rank_update_(
    weight: Tensor,
    x: Tensor,
    dy: Tensor,
    beta: Tensor,
    *,
    scale: float = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
    backend: str = "auto",
) -> None:
    """Add a product of factors to a weight, in place, rounding once.

        W ← round(scale · W + dyᵀ diag(β) x)

    Sums are in the compute type. The weight is taken in blocks of rows, so that what a 16-bit
    weight needs beside it is small. Not differentiable.

    Args:
        weight: (out, in), or (n, out / n, in) as slices of a fused projection are; any strides.
            Mutated.
        x: (R, in), weight's dtype or its compute type. R may be 0.
        dy: (R, out), likewise.
        beta: (R,), float32 or float64.
        scale: factor of the weight.
        rounding: "nearest" or "stochastic" (seeded, 16-bit weights; the bits of tensor 0 of
            ``rounding.random_bits``, elements of the weight counted row by row).
        seed: counter of the random bits.
        backend: "auto", "torch" or "triton".

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or unknown rounding.
    """
    check_matrix("rank_update_", "weight", weight)
    check_own_rounding("rank_update_", rounding)
    storage = (weight.dtype, compute_dtype(weight.dtype))
    tensors = [
        ("x", x, ("R", "in"), storage),
        ("dy", dy, ("R", "out"), storage),
        ("beta", beta, ("R",), COEFFICIENTS),
    ]
    sizes = {"out": weight.shape[:-1].numel(), "in": weight.shape[-1]}
    check_factors("rank_update_", weight, tensors, sizes)
    torch.ops.ttt_fast.rank_update_(
        weight, x, dy, beta, scale=float(scale), rounding=rounding, seed=seed,
        backend=choose("rank_update_", weight.device.type, backend),
    )  # fmt: skip
