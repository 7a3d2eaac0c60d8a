"""The ops of a model's layers: norms, linears, gated units, rotary, attention; their gradients.

What :mod:`ttt_fast.ops` says of its tensors holds here; callers find these ops there, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_fast.dispatch import choose, choose_but_float16
from ttt_fast.layer_reference import GLU_ACTIVATIONS
from ttt_fast.op_checks import check_factors, with_rows
from ttt_fast.rounding import compute_dtype


@torch.no_grad()
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, round_first: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Root mean square norm with a weight for each delta:  y = w ∘ x / sqrt(mean(x²) + ε).

    Zhang and Sennrich (2019). Arithmetic is in the compute type whatever the dtype; y is rounded
    once, twice with ``round_first``.

    Args:
        x: (B, M, D).
        weight: (B, D), of the compute type.
        eps: ε.
        round_first: round x / rms to the dtype of x before it is multiplied by the weight, as
            Llama and most families do; Gemma and OLMo 2 do not.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        y as x, and 1 / rms, (B, M) of the compute type, which the backward needs.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or the backend cannot run there.
    """
    chosen = _rms_norm_backend("rms_norm", x, weight, [], backend)
    return torch.ops.ttt_fast.rms_norm(
        x.contiguous(), weight.contiguous(), eps=eps, round_first=round_first, backend=chosen
    )


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    round_first: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_norm` for dy at y.

        dx = (g − x̂·mean(g ∘ x̂)) / rms,   dw = Σ_tokens dy ∘ x̂,   g = w ∘ dy,   x̂ = x / rms

    Args:
        dy: (B, M, D), as x.
        x: what the forward was given.
        weight: likewise.
        rstd: 1 / rms, as the forward returned it.
        round_first: as in the forward; in dw, x̂ is rounded with it.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        dx as x, and dw (B, D) of the compute type.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or the backend cannot run there.
    """
    more = [("dy", dy, ("B", "M", "D"), ()), ("rstd", rstd, ("B", "M"), (compute_dtype(x.dtype),))]
    chosen = _rms_norm_backend("rms_norm_backward", x, weight, more, backend)
    return torch.ops.ttt_fast.rms_norm_backward(
        dy.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous(),
        round_first=round_first, backend=chosen,
    )  # fmt: skip


def _rms_norm_backend(op: str, x: Tensor, weight: Tensor, more: list, backend: str) -> str:
    wide = (compute_dtype(x.dtype),)
    tensors = [("x", x, ("B", "M", "D"), ()), ("weight", weight, ("B", "D"), wide), *more]
    check_factors(op, x, tensors, {})
    return choose(op, x.device.type, backend)


@torch.no_grad()
def linears(x: Tensor, weights: Sequence[Tensor], *, backend: str = "auto") -> list[Tensor]:
    """Several linear layers of one input:  y_i = x W_iᵀ.

    In the compute type, y rounded once. In C++ W is read as it lies, once, while the next of it is
    fetched; libraries copy it into another order first, which many rows are worth. Queries, keys
    and values are one call, and so are gate and up.

    With Intel's matrix registers (AMX) and sides of W that are multiples of 32, 24 rows or more of
    float32 are multiplied as sums of three bfloat16 (csrc/cpu/float_tiles.h): as near to the exact
    result as float32's own products, but other bits than for fewer rows; what is not finite gives
    NaN, and what is below 2⁻¹²⁶ is lost.

    Args:
        x: (..., in).
        weights: (out, in) each, at least one.
        backend: "auto", "torch" or "cpp" (all but float16).

    Returns:
        y of each, (..., out), in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or the backend cannot run there.
    """
    chosen = _linears_backend("linears", [("x", x, "in")] * len(weights), weights, backend)
    return torch.ops.ttt_fast.linears(x.contiguous(), [*map(with_rows, weights)], backend=chosen)


@torch.no_grad()
def linears_backward(
    dys: Sequence[Tensor], weights: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """Gradient of :func:`linears` at x:  dx = Σ_i dy_i W_i,  summed in the compute type.

    Args:
        dys: (..., out) each, the gradients at y.
        weights: (out, in) each, as many.
        backend: "auto", "torch" or "cpp" (all but float16).

    Returns:
        dx, (..., in), in the dtype of dys, rounded once.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or the backend cannot run there.
    """
    op = "linears_backward"
    if len(dys) != len(weights):
        raise ValueError(f"{op}: got {len(dys)} dys but {len(weights)} weights; give one for each.")
    given = [(f"dys[{i}]", dy, "out") for i, dy in enumerate(dys)]
    chosen = _linears_backend(op, given, weights, backend)
    return torch.ops.ttt_fast.linears_backward(
        [dy.contiguous() for dy in dys], [*map(with_rows, weights)], backend=chosen
    )


def _linears_backend(
    op: str, given: list[tuple[str, Tensor, str]], weights: Sequence[Tensor], backend: str
) -> str:
    """Check each weight with the tensor that it meets, whose last axis is named."""
    if not weights:
        raise ValueError(f"{op}: got no weights; give at least one.")
    lead = given[0][1]
    shared: dict[str, int] = {}
    for i, ((name, tensor, last), weight) in enumerate(zip(given, weights, strict=True)):
        axes = (*(f"n{d}" for d in range(lead.dim() - 1)), last)
        tensors = [(name, tensor, axes, ()), (f"weights[{i}]", weight, ("out", "in"), ())]
        sizes = dict(shared)
        check_factors(op, lead, tensors, sizes)
        shared = {axis: size for axis, size in sizes.items() if axis != "out"}
    return choose_but_float16(op, lead, backend)


@torch.no_grad()
def glu(gate: Tensor, up: Tensor, *, activation: str = "silu", backend: str = "auto") -> Tensor:
    """Gated linear unit of two projections:  y = round(act(gate)) ∘ up.

    Shazeer (2020): SwiGLU with "silu", GeGLU with "gelu_tanh". Arithmetic is in the compute type;
    act(gate) is rounded to the storage type, as models' own code does.

    Args:
        gate: any shape.
        up: of the shape and dtype of gate.
        activation: "silu", or "gelu_tanh" (GELU in its tanh form).
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        y as gate.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, the activation is unknown, or the
            backend cannot run there.
    """
    chosen = _glu_backend("glu", [("gate", gate), ("up", up)], activation, backend)
    return torch.ops.ttt_fast.glu(
        gate.contiguous(), up.contiguous(), activation=activation, backend=chosen
    )


def glu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, *, activation: str = "silu", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`glu`:  dgate = dy ∘ up ∘ act′(gate),   dup = dy ∘ round(act(gate)).

    Args:
        dy: gradient at y.
        gate: what the forward was given.
        up: likewise.
        activation: as in the forward.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        dgate and dup, as gate.

    Raises:
        ValueError: as in the forward.
    """
    tensors = [("gate", gate), ("up", up), ("dy", dy)]
    chosen = _glu_backend("glu_backward", tensors, activation, backend)
    return torch.ops.ttt_fast.glu_backward(
        dy.contiguous(), gate.contiguous(), up.contiguous(), activation=activation, backend=chosen
    )


def _glu_backend(op: str, tensors: list[tuple[str, Tensor]], activation: str, backend: str) -> str:
    gate = tensors[0][1]
    if activation not in GLU_ACTIVATIONS:
        known = ", ".join(map(repr, GLU_ACTIVATIONS))
        raise ValueError(f"{op}: activation={activation!r} is unknown; use one of {known}.")
    axes = tuple(f"n{i}" for i in range(gate.dim()))
    check_factors(op, gate, [(name, tensor, axes, ()) for name, tensor in tensors], {})
    return choose(op, gate.device.type, backend)


@torch.no_grad()
def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool = False, backend: str = "auto"
) -> Tensor:
    """Rotary positions of queries or keys:  y = x ∘ cos + rotate_half(x) ∘ sin.

    Su et al. (2021), with the halves of a head as pairs: for a = x[:R/2] and b = x[R/2:R],
    y[:R/2] = a ∘ cos₁ − b ∘ sin₁ and y[R/2:R] = b ∘ cos₂ + a ∘ sin₂; columns from R on stay as
    they are (GPT-NeoX, Phi). The gradient at x is the transpose of this map applied to the one at
    y, which is the map of −sin if the halves of cos and of sin are equal, as they usually are:

        y[:R/2] = a ∘ cos₁ + b ∘ sin₂,   y[R/2:R] = b ∘ cos₂ − a ∘ sin₁      with ``transposed``

    Arithmetic is in the compute type; products are rounded to the dtype of cos and the sum to that
    of x, as models' own code does, so that all backends give the same bits.

    Args:
        x: (B, H, T, D), its rows consecutive; any other strides (else it is copied).
        cos: (B, T, R), or (1, T, R) for all rows of the batch; R even, at most D; dtype of x or
            its compute type.
        sin: likewise, as cos.
        transposed: apply the transpose.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        y as x, also in the order of memory, as results of torch's own operations.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or the backend cannot run there.
    """
    angles: tuple[str, ...] = ("B", "T", "R")
    sizes: dict[str, int] = {}
    if cos.shape[:1] == (1,):
        angles, sizes = ("1", "T", "R"), {"1": 1}
    tensors = [
        ("x", x, ("B", "H", "T", "D"), ()),
        ("cos", cos, angles, (x.dtype, compute_dtype(x.dtype))),
        ("sin", sin, angles, (cos.dtype,)),
    ]
    check_factors("rotary", x, tensors, sizes)
    turned, width = cos.shape[-1], x.shape[-1]
    if turned % 2 or turned > width:
        raise ValueError(
            f"rotary: cos has {turned} columns; they must be even, at most the {width} of x."
        )
    x, cos, sin = map(with_rows, (x, cos, sin))
    return torch.ops.ttt_fast.rotary(
        x, cos, sin, transposed=transposed, backend=choose("rotary", x.device.type, backend)
    )


@torch.no_grad()
def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention,  y = P v  with  P = softmax(scale · q kᵀ + mask),  at q, k and v.

        dq = dS k,   dk = dSᵀ q,   dv = Pᵀ dy,   dS = scale · P ∘ (dP − Σ P ∘ dP),   dP = dy vᵀ

    P is computed again, so that q, k and v are all that needs to be kept (Dao et al., 2022, whose
    statistics of the forward this does not need). Arithmetic is in the compute type whatever the
    dtype; each gradient is rounded once. A query that attends to no key has P = 0. The forward is
    ``torch.nn.functional.scaled_dot_product_attention``, and on a GPU so is the backward.

    Args:
        dy: (B, H, T, D), the gradient at y.
        q: (B, H, T, D).
        k: (B, G, S, D), G a divisor of H: query head h attends to head h // (H / G).
        v: (B, G, S, D).
        mask: (B or 1, H or 1, T or 1, S), of bool (True: attended to), or of the dtype of q (added
            to the scores); None for none.
        scale: factor of the scores, usually 1 / sqrt(D).
        causal: query i attends to keys 0 to i only.
        backend: "auto", "torch" or "cpp".

    Returns:
        dq, dk and dv, of the shapes of q, k and v, in the order of memory of (B, T, H, D), as
        projections have it.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or the backend cannot run there.
    """
    op, queries, keys = "attention_backward", ("B", "H", "T", "D"), ("B", "G", "S", "D")
    sizes: dict[str, int] = {}
    given = [("q", q, queries), ("dy", dy, queries), ("k", k, keys), ("v", v, keys)]
    check_factors(op, q, [(*each, ()) for each in given], sizes)
    if not sizes["G"] or not sizes["H"] or sizes["H"] % sizes["G"]:
        raise ValueError(
            f"{op}: q has {sizes['H']} heads and k {sizes['G']}; give k a divisor of those of q."
        )
    if mask is not None:
        axes = tuple(
            "1" if size == 1 and axis != "S" else axis
            for axis, size in zip("BHTS", mask.shape, strict=False)
        )
        axes = axes if mask.dim() == 4 else tuple("BHTS")
        check_factors(op, q, [("mask", mask, axes, (torch.bool, q.dtype))], sizes | {"1": 1})
    rows = map(with_rows, (dy, q, k, v, mask))
    return torch.ops.ttt_fast.attention_backward(
        *rows, scale=scale, causal=causal, backend=choose(op, q.device.type, backend)
    )
