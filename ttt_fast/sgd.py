"""SGD on coefficients: weights and momentum as sums of the base weight and the raw gradients.

``clip_grad_norm_`` and ``torch.optim.SGD`` turn W and the momentum buffer M into

    g  = c·G_t                            c = min(1, max_grad_norm / (‖G_t‖ + 1e-6))
    W  = (1 − lr·wd)·W                    decoupled weight decay, or
    g  = g + wd·W                         coupled weight decay
    M  = g                                on the first step,
         μ·M + (1 − τ)·g                  later (momentum μ, dampening τ)
    u  = g + μ·M with Nesterov, M without; g when μ = 0 (no buffer, no dampening)
    W  = W − lr·u

Every line is linear in (W, M, G_t). W starts as W₀ and M as nothing, so by induction both stay in
the span of W₀ and the raw gradients seen so far:

    W_t = ρ_t·W₀ − Σ_s β_{t,s}·G_s        M_t = σ_t·W₀ + Σ_s α_{t,s}·G_s

In the basis (W₀, G_1, …, G_t), W is the row (ρ, −β), M the row (σ, α), and the clipped gradient
c·G_t is zero but for c in its last place. A step is therefore the lines above, unchanged, on rows
of numbers instead of on matrices: no momentum buffer, no gradient and no second copy of a weight
exists. Where μ = 0, the line of M with τ = 0 gives M = g and so u = g: plain SGD needs no case of
its own beside deltas with momentum.

Gradients are never rescaled once they are kept; going back to step k is taking row k.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt_fast import reference


def clip_coefficient(norm: Tensor, max_grad_norm: float | Tensor | None) -> Tensor:
    """What ``clip_grad_norm_`` multiplies gradients by:  min(1, max_grad_norm / (norm + 1e-6)).

    Args:
        norm: global gradient norm of each delta, (D,), floating.
        max_grad_norm: one limit, or one for each delta, (D,). None or infinity is no clipping: the
            coefficient is 1, also where the norm is not finite.

    Returns:
        (D,), in the dtype of ``norm``, or of a (D,) limit where that is wider.
    """
    if max_grad_norm is None:
        return torch.ones_like(norm)
    if not isinstance(max_grad_norm, Tensor):
        max_grad_norm = norm.new_full((), max_grad_norm)
    coefficient = reference.clip_coefficient(norm, max_grad_norm)
    return torch.where(max_grad_norm.isinf(), 1.0, coefficient)


class Coefficients:
    """The optimizer state of D deltas of one parameter group: a row of numbers for each step.

        W_t = ρ_t·W₀ − Σ_s β_{t,s}·G_s          M_t = σ_t·W₀ + Σ_s α_{t,s}·G_s

    G_s is the raw gradient of step s, before clipping. The arithmetic is in float64 on ``device``
    (β multiplies in float32 where it is used). Tensors handed out are never written to afterwards,
    and must not be written to by others: steps and clones share them.

    Args:
        n_deltas: D.
        momentum: μ, one number or one for each delta, (D,), in float64 (0.9 in float32 is another
            number). A delta whose momentum is 0 takes plain SGD steps, whatever its dampening.
        dampening: τ, likewise. Ignored on a delta's first step, as in torch.
        nesterov: Nesterov momentum, for all deltas.
        weight_decay: wd, likewise. Where it is 0, ρ stays exactly 1.
        decoupled_weight_decay: multiply W by 1 − lr·wd before the update instead of adding wd·W to
            the gradient.
        device: where the coefficients live; default the CPU.

    Attributes:
        started: (D,) bool, the deltas that took a step.

    Raises:
        ValueError: an option is neither a number nor (D,), or Nesterov meets dampening.
    """

    def __init__(
        self,
        n_deltas: int,
        *,
        momentum: float | Tensor,
        dampening: float | Tensor = 0.0,
        nesterov: bool = False,
        weight_decay: float | Tensor = 0.0,
        decoupled_weight_decay: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        damped = dampening.any() if isinstance(dampening, Tensor) else dampening
        if nesterov and bool(damped):
            raise ValueError(
                f"Coefficients: nesterov with dampening={dampening}; Nesterov momentum needs"
                " dampening=0."
            )
        self.started = torch.zeros(n_deltas, dtype=torch.bool, device=device)
        self._momentum = self._column("momentum", momentum)
        dampening = self._column("dampening", dampening)
        self._dampening = torch.where(self._momentum == 0, 0.0, dampening)
        self._weight_decay = self._column("weight_decay", weight_decay)
        self._nesterov = nesterov
        self._decoupled = decoupled_weight_decay
        # Entry t is W_t = (ρ, −β), (D, 1 + t): a step adds a tensor and copies no earlier one.
        self._weights = [torch.ones(n_deltas, 1, dtype=torch.float64, device=device)]
        self._buffer = torch.zeros_like(self._weights[0])  # M = (σ, α) of the last step

    @property
    def rho(self) -> Tensor:
        """Coefficient of W₀ in the weights, (D,) float64."""
        return self._weights[-1][:, 0]

    @property
    def beta(self) -> Tensor:
        """Coefficients of −G_s in the weights, (D, S) float64; S is the number of steps so far."""
        return -self._weights[-1][:, 1:]

    @property
    def sigma(self) -> Tensor:
        """Coefficient of W₀ in the momentum buffer, (D,) float64; the last gradient's if μ = 0."""
        return self._buffer[:, 0]

    @property
    def alpha(self) -> Tensor:
        """Coefficients of G_s in the momentum buffer, (D, S) float64; as ``sigma`` if μ = 0."""
        return self._buffer[:, 1:]

    def advance(self, clip: Tensor, lr: float | Tensor, active: Tensor) -> None:
        """Take one step: append the column of this step's raw gradient, without reading it back.

        A delta that is not active is skipped whole, as torch skips a parameter whose gradient is
        None: no decay, no momentum, 0 in the new column. Its first step is still to come.

        Args:
            clip: what the raw gradient is multiplied by, (D,), floating. May hold anything where
                ``active`` is false.
            lr: learning rate, one number or one for each delta, (D,).
            active: (D,) bool, the deltas that have a gradient.

        Raises:
            ValueError: a tensor is not (D,).
        """
        clip, lr = self._column("clip", clip), self._column("lr", lr)
        if active.shape != self.started.shape:
            raise ValueError(
                f"advance: active has shape {tuple(active.shape)}, there are"
                f" {len(self.started)} deltas; pass one flag for each."
            )
        old_weight = F.pad(self._weights[-1], (0, 1))
        old_buffer = F.pad(self._buffer, (0, 1))

        weight = old_weight
        grad = F.pad(clip, (weight.shape[1] - 1, 0))
        if self._decoupled:
            weight = (1.0 - lr * self._weight_decay) * weight
        else:
            grad = grad + self._weight_decay * weight
        later = self._momentum * old_buffer + (1.0 - self._dampening) * grad
        buffer = torch.where(self.started[:, None], later, grad)
        update = grad + self._momentum * buffer if self._nesterov else buffer
        weight = weight - lr * update

        # where, not a product: a skipped delta's clip may be NaN.
        self._weights.append(torch.where(active[:, None], weight, old_weight))
        self._buffer = torch.where(active[:, None], buffer, old_buffer)
        self.started = self.started | active

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Coefficients of the weights after the first ``step`` steps, skipped ones counted.

        Args:
            step: 0 (the base weights: ones and zeros) to S, the number of steps so far.

        Returns:
            ρ, (D,), and β, (D, S), float64; the columns of later steps are 0.

        Raises:
            ValueError: there is no such step.
        """
        last = len(self._weights) - 1
        if not 0 <= step <= last:
            raise ValueError(f"at: step {step} was asked for; there are steps 0 to {last}.")
        weight = self._weights[step]
        return weight[:, 0], F.pad(-weight[:, 1:], (0, last - step))

    def clone(self) -> Coefficients:
        """An independent copy: a group splits where only some of its parameters got a gradient."""
        twin = copy.copy(self)
        twin._weights = self._weights.copy()
        return twin

    def _column(self, name: str, value: float | Tensor) -> Tensor:
        """One number for each delta as a float64 column, (D, 1)."""
        n_deltas, device = len(self.started), self.started.device
        if not isinstance(value, Tensor):
            # full writes on the device; tensor() would copy from the host.
            value = torch.full((n_deltas,), value, dtype=torch.float64, device=device)
        if value.shape != (n_deltas,):
            raise ValueError(
                f"Coefficients: {name} has shape {tuple(value.shape)}, there are {n_deltas} deltas;"
                f" pass a number or a tensor of shape ({n_deltas},)."
            )
        return value.to(device=device, dtype=torch.float64)[:, None]
