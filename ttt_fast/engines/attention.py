"""Torch's attention on a CPU, with a backward that needs queries, keys and values alone.

The forward is torch's own, bit for bit. Its backward keeps the result, too, and in 16 bits takes 2
to 10 times as long as :func:`ops.attention_backward`, whose gradients are the more exact ones (a
layer of SmolLM2, 20 to 256 tokens, 2 threads of a Xeon with AMX).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as remember
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttt_fast.op_checks import DTYPES, with_rows

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class Interfaces:
    """The attention functions that a file of transformers knows, torch's among them as said above.

    Args:
        own: those of the file, by name.
        own_code: whether to leave an input to torch's own backward.
        backward: the op ``attention_backward``.
    """

    def __init__(
        self, own: Any, own_code: Callable[[Tensor], bool], backward: Callable[..., Any]
    ) -> None:
        self._own, self._own_code, self._backward = own, own_code, backward

    def __getitem__(self, name: str) -> Attention:
        return self._found(self._own[name])

    def get_interface(self, name: str, default: Attention) -> Attention:
        """The function of that name, which transformers 5 asks for so."""
        return self._found(self._own.get_interface(name, default))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def _found(self, function: Attention) -> Attention:
        if function is not _stock():
            return function  # somebody's own, whatever its name
        return partial(_attend, function, self._own_code, self._backward)


@remember
def _stock() -> Attention:
    # To import it takes seconds, and a model of transformers has done it.
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def _attend(
    stock: Attention,
    own_code: Callable[[Tensor], bool],
    backward: Callable[..., Any],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention interface: (N, T, H, D), and no attention weights."""
    states = query, key, value
    if not _takes(states, attention_mask, options) or any(map(own_code, states)):
        return stock(module, query, key, value, attention_mask, **options)
    # As the stock function reads its arguments.
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scale = options.get("scaling")
    run = partial(
        backward,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        causal=bool(causal) and attention_mask is None and query.shape[2] > 1,
    )
    forward = partial(stock, module, **options)
    return _Attention.apply(query, key, value, attention_mask, forward, run), None


def _takes(states: tuple[Tensor, ...], mask: Tensor | None, options: dict[str, Any]) -> bool:
    query, key, value = states
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    usual = query.dtype in DTYPES and all(x.is_cpu and x.dtype == query.dtype for x in states)
    heads = query.dim() == key.dim() == 4 and key.shape == value.shape and key.shape[1] > 0
    if not (usual and heads and query.shape[1] % key.shape[1] == 0):
        return False
    if mask is not None and not _takes_mask(mask, query, key):
        return False
    # What the backward does not know.
    other = options.get("cache") is not None or options.get("position_bias") is not None
    return not (other or options.get("dropout")) and any(x.requires_grad for x in states)


def _takes_mask(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a mask is one of :func:`ops.attention_backward`, and learns nothing."""
    whole = (*query.shape[:3], key.shape[2])
    fits = mask.dim() == 4 and mask.shape[-1] == whole[-1]
    fits = fits and all(n in (1, m) for n, m in zip(mask.shape, whole, strict=True))
    return fits and mask.dtype in (torch.bool, query.dtype) and not mask.requires_grad


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        forward: Attention,
        backward: Callable[..., Any],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.run = backward
        return forward(query, key, value, mask)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Heads before tokens, which the interface has the other way round.
        found = ctx.run(*map(with_rows, (dy.transpose(1, 2), *ctx.saved_tensors)))
        needed = zip(found, ctx.needs_input_grad, strict=False)
        return *(d if n else None for d, n in needed), None, None, None
