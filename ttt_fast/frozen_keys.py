"""Query-only test-time training: a context's keys and values stay those of the unadapted weights.

``TTTConfig(kv="frozen")``, the method of Bansal et al. (2025), "Let's (not) just put things in
Context: Test-Time Training for Long-Context LLMs" (arXiv 2512.13898): one prefill of the context;
each step takes a span of it, whose tokens go through the adapted model and attend to the frozen
keys and values of all before them. Here an answer is generated from the frozen ones, too.

    L = − 1/k Σ_{i = s}^{s + k − 1} log p(x_{i+1} | K₀, V₀ of x_{< s}, x_{s..i})      s at random

("sum" leaves out 1/k.) The span's own keys and values are computed with the adapted weights. This
is another objective than that of ``kv="exact"``, where nothing is frozen: it costs span · context
attention in place of context², and its gradient does not see what adapted weights would make of the
context. The method trains the queries; with any other scope, too, what lies before a span stays as
the unadapted weights made it, also where an adapted parameter would change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ttt_fast.batch import IGNORE_INDEX, Batch, complete_batch, forward_arguments, pad_rows
from ttt_fast.config import TTTConfig
from ttt_fast.span_cache import Layers, SpanCache


class FrozenKeys:
    """Contexts with their keys and values under the unadapted weights, from a prefill.

        with ttt.begin() as session:
            frozen = session.prefill(Batch(context))
            session.step(frozen.spans([(512, 641), (9000, 9129)]))

    Nothing here changes: steps and generations read it.

    Attributes:
        ids: of each context, (T,) its tokens.
        delta_index: the delta that each trains.
    """

    def __init__(
        self,
        ids: Sequence[Tensor],
        layers: Sequence[Layers],
        delta_index: Sequence[int],
        row_weights: Tensor | None = None,
    ) -> None:
        self.ids, self.delta_index = list(ids), list(delta_index)
        self._layers, self._row_weights = list(layers), row_weights

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; contexts that are equal share them."""
        tensors = {id(t): t for layers in self._layers for pair in layers for t in pair}
        return sum(tensor.nbytes for tensor in tensors.values())

    def spans(self, ends: Sequence[tuple[int, int]], rows: Sequence[int] | None = None) -> Batch:
        """A batch of spans, each behind the keys and values of all tokens before it.

        Args:
            ends: of each span, its first token and the one behind its last. They go through the
                model, and each but the first is predicted.
            rows: the context of each span; default the first for all.

        Raises:
            ValueError: no span, or one that is not inside its context or has nothing to predict.
        """
        rows = [0] * len(ends) if rows is None else list(rows)
        if not ends or len(rows) != len(ends):
            raise ValueError(
                f"spans: got {len(ends)} spans and {len(rows)} rows; give at least one span, and"
                " for each the number of its context."
            )
        for (start, stop), row in zip(ends, rows, strict=True):
            if not 0 <= row < len(self.ids):
                raise ValueError(f"spans: there is no context {row}, but {len(self.ids)} from 0.")
            length = self.ids[row].numel()
            if not 0 <= start <= stop - 2 <= length - 2:
                raise ValueError(
                    f"spans: got ({start}, {stop}) of a context of {length} tokens; a span has at"
                    " least two of them."
                )
        ids, mask = pad_rows(
            [self.ids[row][start:stop] for (start, stop), row in zip(ends, rows, strict=True)],
            pad_value=0,
            side="right",
        )
        starts = [start for start, _ in ends]
        positions = (mask.cumsum(1) - 1) + torch.tensor(starts, device=mask.device)[:, None]
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
        labels[:, 0] = IGNORE_INDEX
        index = torch.tensor([self.delta_index[row] for row in rows], device=ids.device)
        return Batch(
            input_ids=ids,
            labels=labels,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=SpanCache([self._layers[row] for row in rows], starts),
            delta_index=index,
        )

    def drawn(self, config: TTTConfig, step: int, deltas: Iterable[int] | None = None) -> Batch:
        """The spans of a step: ``config.spans`` of ``config.span_tokens`` predictions a context.

        They lie at the same relative places in all contexts, whatever else is adapted with them.

        Args:
            config: settings; the seed, too.
            step: number of the step, from 0.
            deltas: whose contexts; default all.

        Raises:
            ValueError: none of these deltas has a context.
        """
        wanted = set(self.delta_index if deltas is None else deltas)
        rows = [n for n, delta in enumerate(self.delta_index) if delta in wanted]
        if not rows:
            raise ValueError(
                f"drawn: deltas {sorted(wanted)} have no context; there are contexts of"
                f" {sorted(set(self.delta_index))}."
            )
        generator = torch.Generator().manual_seed(config.random_stream(0, step))
        places = torch.rand(config.spans, generator=generator, dtype=torch.float64).tolist()
        ends = []
        for length in (self.ids[row].numel() for row in rows):
            t = config.span_length(length)
            starts = [int(place * (length - t + 1)) for place in places]
            ends += [(start, start + t) for start in starts]
        batch = self.spans(ends, [row for row in rows for _ in places])
        if self._row_weights is None:
            return batch
        weights = self._row_weights[rows].repeat_interleave(config.spans) / config.spans
        return replace(batch, row_weights=weights)

    def cache(self, rows: Sequence[int], width: int) -> DynamicCache:
        """A cache of all tokens but the last of some contexts, to go on from.

        It is the caller's: what is appended to it does not come here.

        Args:
            rows: which contexts.
            width: tokens of each row in the cache, those of padding on the left included.
        """
        lengths = [self.ids[row].numel() - 1 for row in rows]
        cache = DynamicCache()
        for number, layer in enumerate(SpanCache([self._layers[n] for n in rows], lengths).layers):
            cache.update(*layer.before(width), number)
        return cache


def complete_contexts(contexts: Batch, model: nn.Module, n_deltas: int) -> Batch:
    """As :func:`ttt_fast.batch.complete_batch`, for rows that begin with their first token.

    Raises:
        ValueError: they do not, or do not fit the model.
    """
    complete = complete_batch(contexts, model, n_deltas)
    there = complete.attention_mask != 0
    counted = (complete.attention_mask.cumsum(1) - 1)[there]
    given = complete.position_ids
    moved = given is not None and bool((given[there] != counted).any())
    if complete.past_key_values is not None or moved:
        raise ValueError(
            "prefill: a context begins with its first token, at position 0; leave out"
            " past_key_values and position_ids."
        )
    return complete


@torch.no_grad()
def prefill(model: nn.Module, contexts: Batch) -> FrozenKeys:
    """Keys and values of contexts with what the model computes now, one context after the other.

    Args:
        model: the model.
        contexts: complete; only tokens, mask, row weights and deltas are looked at.

    Raises:
        ValueError: the model gives no keys and values.
    """
    arguments = forward_arguments(model)
    ids = [
        row[mask != 0]
        for row, mask in zip(contexts.input_ids, contexts.attention_mask, strict=True)
    ]
    known: dict[tuple[int, ...], Layers] = {}
    layers = []
    for row in ids:
        key = tuple(row.tolist())
        if key not in known:
            known[key] = _layers_of(model, row, arguments)
        layers.append(known[key])
    return FrozenKeys(ids, layers, contexts.delta_index.tolist(), contexts.row_weights)


def _layers_of(model: nn.Module, ids: Tensor, arguments: frozenset[str]) -> Layers:
    """Keys and values of all layers for one row of tokens."""
    # Without a configuration it keeps all tokens in every layer, windows or not.
    cache = DynamicCache()
    inputs: dict[str, Any] = {
        "input_ids": ids[None],
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    if "past_key_values" in arguments:
        model(**{name: value for name, value in inputs.items() if name in arguments})
    lengths = {0 if layer.keys is None else layer.keys.shape[-2] for layer in cache.layers}
    if lengths != {ids.numel()}:
        raise ValueError(
            f"kv='frozen': {type(model).__name__} does not put the keys and values of all its"
            " layers into past_key_values. Use kv='exact'."
        )
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]
