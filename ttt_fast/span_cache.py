"""What stands before the spans of a step: keys and values that are read and never written.

A cache for one forward after the other, which all find it as it was: it keeps nothing of what the
model gives it. Where the model's attention is torch's (``attn_implementation="sdpa"``), a span
attends to what is before it where it lies (:mod:`ttt_fast.span_attention`); any other attention
gets both in one tensor, which is a copy for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache as remember
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache, CacheLayerMixin

from ttt_fast.scope import is_compiled
from ttt_fast.span_attention import Past, span_attention

# Of one context, keys and values of each layer, (H_kv, T, D).
Layers = Sequence[tuple[Tensor, Tensor]]

_NAME = "ttt_fast_span"
_SETTING = "_attn_implementation_internal"
# What eager attentions do and torch's does not.
_MORE = ("softcap", "position_bias", "s_aux")


class SpanCache(Cache):
    """For each row of a batch, the tokens of some context before the row's first.

    Args:
        contexts: of each row; rows may share one.
        starts: of each row, how many tokens of its context are before it.
    """

    def __init__(self, contexts: Sequence[Layers], starts: Sequence[int]) -> None:
        self.contexts, self.starts = list(contexts), list(starts)
        pasts = [
            [(keys, values, start) for keys, values in context]
            for context, start in zip(contexts, starts, strict=True)
        ]
        super().__init__(layers=[_Layer(list(rows)) for rows in zip(*pasts, strict=True)])

    def rows(self, index: Sequence[int]) -> SpanCache:
        """What is before some of the rows."""
        return SpanCache([self.contexts[n] for n in index], [self.starts[n] for n in index])

    @property
    def even(self) -> bool:
        """Whether equally many tokens are before all rows."""
        return min(self.starts) == max(self.starts)

    def mask(self, like: Tensor) -> Tensor:
        """(N, P), 0 where fewer than the most tokens P are before a row, in dtype and on device."""
        starts = torch.tensor(self.starts, device=like.device)[:, None]
        columns = torch.arange(max(self.starts), 0, -1, device=like.device)
        return (columns <= starts).to(like.dtype)

    def require_attended(self) -> None:
        """After a forward in :func:`reading`.

        Raises:
            ValueError: an attention has not looked at what is before the spans.
        """
        for number, layer in enumerate(self.layers):
            if layer.unread is not None:
                raise ValueError(
                    f"kv='frozen': the attention of layer {number} does not go through"
                    " transformers' attention interface. Load the model with"
                    " attn_implementation='eager'."
                )


class _Layer(CacheLayerMixin):
    """One layer's part. The methods are those of transformers 4.56 and 5."""

    is_sliding = False  # the whole is here, and the masks know about windows

    def __init__(self, past: list[Past]) -> None:
        super().__init__()
        self.past = past
        self.is_initialized = True
        self.reading = False
        self.unread: Tensor | None = None  # the span's keys, on their way to the attention

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values that the span attends to; where it reads the others itself, its own."""
        if self.reading and self.get_seq_length():
            self.unread = key_states
            # The attention is called with what is returned here, and with nothing else of ours.
            key_states.ttt_fast_layer = self
            return key_states, value_states
        return _Joined.apply(key_states, self._keys), _Joined.apply(value_states, self._values)

    def before(self, width: int) -> tuple[Tensor, Tensor]:
        """Copies of keys and values before the rows, (N, H_kv, width, D), 0 on the left of them."""
        keys, values = (
            _joined(states.new_empty(len(past), states.shape[0], 0, states.shape[2]), past, width)
            for past in (self._keys, self._values)
            for states, _ in past[:1]
        )
        return keys, values

    @property
    def _keys(self) -> list[tuple[Tensor, int]]:
        return [(keys, n) for keys, _, n in self.past]

    @property
    def _values(self) -> list[tuple[Tensor, int]]:
        return [(values, n) for _, values, n in self.past]

    def get_seq_length(self) -> int:
        """The most tokens before a row."""
        return max(start for _, _, start in self.past)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """How many keys there are, and the position of the first."""
        if isinstance(query_length, Tensor):
            query_length = query_length.shape[0]  # transformers 4 gives the positions
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No bound."""
        return -1

    def lazy_initialization(self, *states: Tensor) -> None:
        """Nothing is left to do."""


class _Joined(torch.autograd.Function):
    """:func:`_joined`, with a gradient for the spans alone."""

    @staticmethod
    def forward(ctx: Any, span: Tensor, past: list[tuple[Tensor, int]]) -> Tensor:
        joined = _joined(span, past, max(length for _, length in past))
        ctx.length = joined.shape[2] - span.shape[2]
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_joined: Tensor) -> tuple[Tensor, None]:
        return d_joined[:, :, ctx.length :], None


def _joined(span: Tensor, past: list[tuple[Tensor, int]], P: int) -> Tensor:
    """What is before each row, at the right end of P tokens, and the row: (N, H, P + t, D)."""
    N, H, t, D = span.shape
    joined = span.new_zeros(N, H, P + t, D)
    for row, (states, length) in zip(joined, past, strict=True):
        row[:, P - length : P] = states[:, :length]
    joined[:, :, P:] = span
    return joined


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: (N, t, H, D), and no attention weights."""
    layer = getattr(key, "ttt_fast_layer", None)
    if layer is None:
        from transformers.modeling_utils import AttentionInterface

        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    layer.unread = None
    more = [name for name in _MORE if kwargs.get(name) is not None]
    if more:
        raise ValueError(
            f"kv='frozen': {type(module).__name__} has {', '.join(more)}, which torch's attention"
            " does not do. Load the model with attn_implementation='eager'."
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = span_attention(query, key, value, layer.past, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def reading(model: nn.Module, cache: Any, dropout: bool = False) -> Iterator[None]:
    """Around forwards and backwards on rows that have a :class:`SpanCache` before them.

    Torch's attention is replaced in the model's configuration meanwhile. With dropout, which ours
    does not do, everything is as elsewhere.

    Raises:
        ValueError: an attention has not looked at what is before the spans.
    """
    if not isinstance(cache, SpanCache):
        yield
        return
    found = [] if dropout or _autocast(model) else _configs(model)
    if found:
        _register()
    try:
        for config in found:
            setattr(config, _SETTING, _NAME)
        for layer in cache.layers:
            layer.reading = bool(found)
        yield
    finally:
        for config in found:
            setattr(config, _SETTING, "sdpa")
        for layer in cache.layers:
            layer.reading = False
    cache.require_attended()


def attends_apart(model: nn.Module) -> bool:
    """Whether spans attend to what is before them where it lies: with torch's attention."""
    return bool(_configs(model))


def _configs(model: nn.Module) -> list[Any]:
    """Configurations that decide for torch's attention, as long as nothing is compiled."""
    kinds = {type(m) for m in model.modules()}
    kinds = {kind for kind in kinds if hasattr(kind, "_can_set_attn_implementation")}
    if is_compiled(model) or not all(map(_asks_the_interface, kinds)):
        return []
    configs = {id(m.config): m.config for m in model.modules() if type(m) in kinds}
    return [each for each in configs.values() if getattr(each, _SETTING, None) == "sdpa"]


def _autocast(model: nn.Module) -> bool:
    return torch.is_autocast_enabled(next(model.parameters()).device.type)


@remember
def _asks_the_interface(kind: type[nn.Module]) -> bool:
    return kind._can_set_attn_implementation()


@remember
def _register() -> None:
    """Give our attention a name, which no model's configuration has but in :func:`reading`."""
    # To import these takes seconds, and a model of transformers has done it.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
