"""Loops written out in plain torch, and their prompts: what the trainer is held against."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttt_fast import Selection


def prompt_ids(n_tokens: int = 9, n_rows: int = 1, seed: int = 1) -> Tensor:
    """Random ids (n_rows, n_tokens) that are no special token of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 101, (n_rows, n_tokens), generator=generator)


def row_loss(model: nn.Module, row: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of one row (T,) after its first token, scalar with its graph."""
    logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, (row if labels is None else labels)[1:])


def sgd_loop(
    model: nn.Module,
    losses: Iterable[Callable[[nn.Module], Tensor]],
    *,
    lr: float | Sequence[float],
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    max_grad_norm: float | None = None,
    params: Sequence[nn.Parameter] | None = None,
) -> tuple[list[float], list[float]]:
    """SGD on whatever losses are given, one a step, each formula written out; changes the model.

    Returns:
        losses before each update, and gradient norms before clipping.
    """
    params = list(model.parameters()) if params is None else list(params)
    buffers: list[Tensor | None] = [None] * len(params)
    values, norms = [], []
    for step, loss_of in enumerate(losses):
        rate = lr[step] if isinstance(lr, Sequence) else lr
        loss = loss_of(model)
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        norm = torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt()
        clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm.item() + 1e-6))
        values.append(loss.item())
        norms.append(norm.item())
        with torch.no_grad():
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                if grad is None:
                    continue
                g = grad * clip
                if decoupled:
                    param.mul_(1 - rate * weight_decay)
                else:
                    g = g + weight_decay * param
                if momentum:
                    old = buffers[i]
                    buffers[i] = g if old is None else momentum * old + (1 - dampening) * g
                    g = g + momentum * buffers[i] if nesterov else buffers[i]
                param.sub_(rate * g)
    return values, norms


def selected_rows_loop(
    model: nn.Module,
    losses: Iterable[Callable[[nn.Module], Tensor]],
    selections: Sequence[Selection],
    *,
    max_grad_norm: float | None = None,
    **options: float,
) -> list[float]:
    """Torch's SGD on the whole of fused projections, of which only the selected rows may move.

    Returns:
        gradient norms before clipping.
    """
    params = params_of(model, selections)
    masks = []
    for selection in selections:
        mask = torch.zeros_like(selection.param)
        selection.view(mask).fill_(1)
        masks.append(mask)
    optimizer = torch.optim.SGD(params, **options)
    norms = []
    for loss_of in losses:
        grads = torch.autograd.grad(loss_of(model), params)
        kept = [p.detach().clone() for p in params]
        for param, grad, mask in zip(params, grads, masks, strict=True):
            param.grad = grad * mask
        norms.append(nn.utils.clip_grad_norm_(params, max_grad_norm or math.inf).item())
        optimizer.step()
        with torch.no_grad():
            # Weight decay has moved the other rows.
            for param, mask, before in zip(params, masks, kept, strict=True):
                param.copy_(torch.where(mask != 0, param, before))
    return norms


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model for the loop to change."""
    return copy.deepcopy(model)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def params_of(model: nn.Module, selections: Sequence[Selection]) -> list[nn.Parameter]:
    """The parameters of a twin that correspond to selections of the original."""
    return [model.get_parameter(selection.name) for selection in selections]


def distance(model: nn.Module, other: nn.Module) -> float:
    """Largest |p - q| / |q| over the parameters of two models, norms taken in float64."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(
        float((p.detach().double() - q.detach().double()).norm() / q.detach().double().norm())
        for p, q in pairs
    )
