"""The loop a researcher writes: what tests, benchmarks and ``--compare`` measure against.

Clone the weights; K times: forward, ``loss.backward()``, ``clip_grad_norm_``, ``optimizer.step()``,
``zero_grad()``; use the model; copy the clone back. Plain torch with its defaults, nothing tuned.
Importable as ``ttt_fast.naive`` through a relative link.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttt_fast.profiling import Phases


def prompt_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of the tokens after the first, in at least fp32 (fp64 stays fp64).

    Args:
        model: a Hugging Face causal language model.
        input_ids: (B, T) int64.
        labels: (B, T), -100 where a token does not count; default `input_ids` where the mask is 1.
        attention_mask: (B, T), 1 for tokens and 0 for padding.
        reduction: "mean" or "sum" over all counted tokens.

    Returns:
        a scalar with its graph.
    """
    if labels is None:
        labels = input_ids
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


@dataclass
class NaiveResult:
    """What the loop did. The model stays adapted until :meth:`restore`.

    Attributes:
        losses: (K,) loss before each update, fp32 (fp64 for an fp64 model).
        grad_norms: (K,) global gradient norm before clipping.
        params: the adapted tensors.
        originals: their values before, in the same order.
        phases: milliseconds and peak bytes of snapshot, forward, backward, update and restore; open
            ``phases("generate")`` around your own use of the model.
    """

    losses: Tensor
    grad_norms: Tensor
    params: list[nn.Parameter]
    originals: list[Tensor]
    phases: Phases

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the original values back."""
        with self.phases("restore"):
            for param, original in zip(self.params, self.originals, strict=True):
                param.copy_(original)


def naive_adapt(
    model: nn.Module,
    input_ids: Tensor,
    *,
    steps: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    max_grad_norm: float | None = 10.0,
    params: Sequence[nn.Parameter] | None = None,
    optimizer: str = "sgd",
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    reduction: str = "mean",
    optimizer_kwargs: Mapping[str, Any] | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
) -> NaiveResult:
    """Take `steps` gradient steps on a prompt with torch's own clipping and optimizer.

    Args:
        model: a Hugging Face causal language model. Its weights are changed in place.
        input_ids: (B, T) int64.
        steps: number of updates K.
        lr: step size.
        momentum: of SGD.
        weight_decay: coupled in SGD, decoupled in AdamW, as in ``torch.optim``.
        dampening: of SGD, not applied on the first step.
        nesterov: of SGD.
        max_grad_norm: bound of ``clip_grad_norm_``; None for no bound.
        params: what to adapt, by default every parameter; the others get
            ``requires_grad=False`` meanwhile.
        optimizer: "sgd" or "adamw".
        labels: as in :func:`prompt_loss`.
        attention_mask: as in :func:`prompt_loss`.
        reduction: "mean" or "sum" over the counted tokens.
        optimizer_kwargs: more for the constructor, such as ``foreach``, ``fused``, ``betas``.
        on_step: called with (step from 1, loss, gradient norm) after each update.

    Returns:
        a :class:`NaiveResult`; call its ``restore()`` to have the weights back.

    Raises:
        ValueError: unknown optimizer.
    """
    adapted = list(model.parameters() if params is None else params)
    kwargs = dict(optimizer_kwargs or {}, lr=lr, weight_decay=weight_decay)
    if optimizer == "sgd":
        kwargs |= {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        opt: torch.optim.Optimizer = torch.optim.SGD(adapted, **kwargs)
    elif optimizer == "adamw":
        opt = torch.optim.AdamW(adapted, **kwargs)
    else:
        raise ValueError(f"optimizer={optimizer!r} is unknown; use 'sgd' or 'adamw'.")

    phases = Phases()
    losses, grad_norms = [], []
    flags = [(param, param.requires_grad) for param in model.parameters()]
    training = model.training
    model.requires_grad_(False).eval()
    for param in adapted:
        param.requires_grad_(True)
    try:
        with phases("snapshot"):
            originals = [param.detach().clone() for param in adapted]
        for step in range(1, steps + 1):
            with phases("forward"):
                loss = prompt_loss(model, input_ids, labels, attention_mask, reduction)
            with phases("backward"):
                loss.backward()
            with phases("update"):
                bound = math.inf if max_grad_norm is None else max_grad_norm
                grad_norm = nn.utils.clip_grad_norm_(adapted, bound)
                opt.step()
                opt.zero_grad()
            losses.append(loss.detach())
            grad_norms.append(grad_norm)
            if on_step is not None:
                on_step(step, loss.item(), grad_norm.item())
    finally:
        model.train(training)
        for param, flag in flags:
            param.requires_grad_(flag)
    return NaiveResult(_stack(losses), _stack(grad_norms), adapted, originals, phases)


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values else torch.empty(0)
