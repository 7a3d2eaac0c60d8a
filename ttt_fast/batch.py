"""What one step sees: rows of tokens, and which delta each row reads and trains."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_fast.span_cache import SpanCache

IGNORE_INDEX = -100

EMPTY_PROMPT = (
    "adapt: the prompt is empty, so there is nothing to learn from. Give at least two tokens."
)


@dataclass(frozen=True)
class Batch:
    """N rows of T tokens. Tensors as in Hugging Face; None means the usual default.

    Attributes:
        input_ids: (N, T) int64.
        labels: (N, T) int64, −100 where there is nothing to predict; default the unmasked
            input_ids.
        attention_mask: (N, T), 0 at padding; default all ones.
        position_ids: (N, T); default counted from the mask.
        token_weights: (N, T) weight of predicting the token at each position.
        row_weights: (N,) weight of each row in its delta's loss; default the mean over the delta's
            rows.
        past_key_values: a cache in front of the rows, for models that take one; or, of spans, what
            :meth:`ttt_fast.frozen_keys.FrozenKeys.spans` puts there.
        delta_index: (N,) int64, which delta each row belongs to; default all 0.
    """

    input_ids: Tensor
    labels: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    token_weights: Tensor | None = None
    row_weights: Tensor | None = None
    past_key_values: Any = None
    delta_index: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.input_ids.device

    @property
    def n_rows(self) -> int:
        """N."""
        return self.input_ids.shape[0]

    def rows(self, index: Tensor) -> Batch:
        """The rows numbered by ``index`` (M,), less the columns that are padding in all of them.

        So a prompt on its own is never padded: it adapts to the bit as if it had come alone.
        """
        everything = index.tolist() == list(range(self.n_rows))
        cache = self.past_key_values
        if isinstance(cache, SpanCache):
            cache = cache.rows(index.tolist())
        elif cache is not None and not everything:
            raise ValueError(
                "Batch: past_key_values belongs to all rows and cannot be divided among deltas;"
                " give one batch for each delta."
            )
        tensors = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        if not everything:
            tensors = {name: tensor[index] for name, tensor in tensors.items()}
        if self.attention_mask is not None:
            used = (tensors["attention_mask"] != 0).any(0).nonzero().flatten()
            first, last = int(used[0]), int(used[-1])
            tensors = {
                name: tensor[:, first : last + 1] if tensor.dim() == 2 else tensor
                for name, tensor in tensors.items()
            }
        return replace(self, past_key_values=cache, **tensors)

    def padded_to(self, n_tokens: int) -> Batch:
        """The rows with padding on the right, to so many tokens. Of a complete batch only."""
        extra = n_tokens - self.input_ids.shape[1]
        if extra <= 0 or self.past_key_values is not None:
            return self
        positions = self.position_ids
        if positions is None:
            positions = torch.arange(n_tokens - extra, device=self.device).expand_as(self.input_ids)
        fill = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0, "token_weights": 0}
        given = {name: getattr(self, name) for name in fill}
        tensors = {
            name: F.pad(tensor, (0, extra), value=fill[name])
            for name, tensor in given.items()
            if tensor is not None
        }
        tensors["position_ids"] = torch.cat([positions, positions[:, -1:].expand(-1, extra)], 1)
        return replace(self, **tensors)

    @torch.inference_mode(False)
    def runs(
        self, max_tokens: int | None = None, max_deltas: int | None = None
    ) -> list[tuple[tuple[int, ...], Batch]]:
        """Runs of consecutive deltas that have equally many rows, with those rows in their order.

        Of a complete batch only. What is in a run can go through the model together.

        Args:
            max_tokens: end a run before its rows, padded to the longest, have more tokens; None for
                no bound. A single delta is a run however long it is: with 0 each is one.
            max_deltas: of a run; None for no bound.
        """
        counts = torch.bincount(self.delta_index).tolist()
        lengths = self.attention_mask.sum(1)
        longest = [
            int(lengths[self.delta_index == delta].max()) if count else 0
            for delta, count in enumerate(counts)
        ]
        runs: list[list[int]] = []
        for delta, count in enumerate(counts):
            run = runs[-1] if runs else []
            width = max([longest[d] for d in run], default=0)
            tokens = count * (len(run) + 1) * max(width, longest[delta])
            joins = run and run[-1] == delta - 1 and counts[run[-1]] == count
            joins = joins and (max_deltas is None or len(run) < max_deltas)
            if count and joins and (max_tokens is None or tokens <= max_tokens):
                run.append(delta)
            elif count:
                runs.append([delta])
        order = [torch.cat([(self.delta_index == d).nonzero() for d in run])[:, 0] for run in runs]
        return [(tuple(run), self.rows(index)) for run, index in zip(runs, order, strict=True)]

    @cached_property
    def padded(self) -> bool:
        """Whether there is padding."""
        # Looked at once: it waits for the device, and the same rows may be stepped on many times.
        return bool((self.attention_mask == 0).any())

    def model_inputs(self, model_arguments: frozenset[str]) -> dict[str, Any]:
        """Keyword arguments of the model's forward.

        Position ids are passed where they are not 0, 1, 2, ... so that padding on either side
        changes nothing.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        cache = self.past_key_values
        spans = isinstance(cache, SpanCache)
        if self.padded or (spans and not cache.even):
            inputs["attention_mask"] = self._whole_mask()
        if self.position_ids is not None and "position_ids" in model_arguments:
            inputs["position_ids"] = self.position_ids
        if cache is not None:
            # The forward appends to the cache that it is given, and the next step wants it as it
            # was; to one of spans nothing is appended.
            inputs["past_key_values"] = cache if spans else copy.deepcopy(cache)
        return {name: value for name, value in inputs.items() if name in model_arguments}

    def _whole_mask(self) -> Tensor:
        """The mask with what is in the cache in front, (N, past + T)."""
        mask, cache = self.attention_mask, self.past_key_values
        if cache is None:
            return mask
        if isinstance(cache, SpanCache):
            return torch.cat([cache.mask(mask), mask], dim=1)
        return torch.cat([mask.new_ones(self.n_rows, cache.get_seq_length()), mask], dim=1)


def past_lengths(batch: Batch) -> list[int]:
    """Tokens in the cache in front of each row."""
    cache = batch.past_key_values
    if isinstance(cache, SpanCache):
        return cache.starts
    return [0 if cache is None else cache.get_seq_length()] * batch.n_rows


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Names that the model's forward takes, those of the models inside a wrapper included."""
    names: set[str] = set()
    while isinstance(model, nn.Module):
        names |= set(inspect.signature(model.forward).parameters)
        # PEFT, DistributedDataParallel and torch.compile hand on whatever they are given.
        inner = getattr(model, "get_base_model", lambda model=model: None)()
        model = inner or getattr(model, "module", None) or getattr(model, "_orig_mod", None)
    return frozenset(names)


@torch.inference_mode(False)
def complete_batch(batch: Batch, model: nn.Module, n_deltas: int) -> Batch:
    """Check a batch against the model and fill in what was left out.

    Raises:
        TypeError: not a Batch, or ids that are not integers.
        ValueError: shapes that do not fit, nothing to learn from, ids outside the vocabulary, too
            long a prompt, deltas that do not exist.
    """
    if not isinstance(batch, Batch):
        raise TypeError(
            f"step: got {type(batch).__name__}; give a ttt_fast.Batch(input_ids=..., ...)."
        )
    ids = _integer_ids(batch.input_ids)
    device = model.get_input_embeddings().weight.device
    N, T = ids.shape
    _check_ids(ids, model)
    mask = batch.attention_mask
    mask = torch.ones_like(ids) if mask is None else _like_ids("attention_mask", mask, ids)
    mask = (mask != 0).long()
    labels = ids if batch.labels is None else _like_ids("labels", batch.labels, ids)
    # A row's first token has nothing before it: on the left of it is padding, or the start.
    predictable = torch.zeros_like(mask, dtype=torch.bool)
    predictable[:, 1:] = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    labels = labels.masked_fill(~predictable, IGNORE_INDEX)
    n_past = past_lengths(batch)
    _check_labels(labels, ids, mask, model, n_past)
    position_ids = batch.position_ids
    if position_ids is not None:
        position_ids = _like_ids("position_ids", position_ids, ids)
    elif bool((mask == 0).any()):
        past = torch.tensor(n_past, device=mask.device)[:, None]
        position_ids = (mask.cumsum(1) - 1).clamp_(min=0) + past
    tensors = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "position_ids": position_ids,
        "token_weights": _token_weights(batch, ids, labels),
        "row_weights": _row_weights(batch, N),
        "delta_index": _delta_index(batch, N, n_deltas),
    }
    return Batch(
        past_key_values=batch.past_key_values,
        **{k: None if v is None else v.to(device) for k, v in tensors.items()},
    )


def _integer_ids(input_ids: Tensor) -> Tensor:
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"adapt: input_ids is {type(input_ids).__name__}; give a tensor of token ids (N, T)."
        )
    if input_ids.dtype.is_floating_point or input_ids.dtype == torch.bool:
        raise TypeError(f"adapt: input_ids has dtype {input_ids.dtype}; token ids are integers.")
    if input_ids.dim() != 2:
        raise ValueError(
            f"adapt: input_ids has shape {tuple(input_ids.shape)}; it must be (rows, tokens)."
        )
    if input_ids.numel() == 0:
        raise ValueError(EMPTY_PROMPT)
    # A clone of an inference tensor made outside inference mode is an ordinary tensor.
    return input_ids.clone().long() if input_ids.is_inference() else input_ids.long()


def _like_ids(name: str, tensor: Tensor, ids: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.shape != ids.shape:
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"adapt: {name} is {got} but input_ids is {tuple(ids.shape)}; they must agree."
        )
    return (tensor.clone() if tensor.is_inference() else tensor).to(ids.device)


def _per_row(name: str, tensor: Tensor, n_rows: int) -> Tensor:
    tensor = torch.as_tensor(tensor)
    tensor = tensor.clone() if tensor.is_inference() else tensor
    if tensor.shape != (n_rows,):
        raise ValueError(
            f"adapt: {name} has shape {tuple(tensor.shape)}; it needs one value for each of the"
            f" {n_rows} rows."
        )
    return tensor


def _delta_index(batch: Batch, n_rows: int, n_deltas: int) -> Tensor:
    if batch.delta_index is None:
        return torch.zeros(n_rows, dtype=torch.int64)
    index = _per_row("delta_index", batch.delta_index, n_rows).long()
    if int(index.min()) < 0 or int(index.max()) >= n_deltas:
        raise ValueError(
            f"step: delta_index has values {int(index.min())} to {int(index.max())} but the session"
            f" has {n_deltas} deltas; they count from 0."
        )
    return index


def _row_weights(batch: Batch, n_rows: int) -> Tensor | None:
    if batch.row_weights is None:
        return None
    weights = _per_row("row_weights", batch.row_weights, n_rows)
    if not bool(torch.isfinite(weights).all()):
        raise ValueError("adapt: row_weights must be finite.")
    return weights


def _token_weights(batch: Batch, ids: Tensor, labels: Tensor) -> Tensor | None:
    if batch.token_weights is None:
        return None
    weights = _like_ids("token_weights", batch.token_weights, ids)
    kept = (weights[:, 1:] * (labels[:, 1:] != IGNORE_INDEX)).sum(1)
    if not bool(torch.isfinite(weights).all()) or bool((kept == 0).any()):
        raise ValueError(
            "adapt: token_weights must be finite and must not sum to 0 over the predicted tokens of"
            " a row."
        )
    return weights


def _check_ids(ids: Tensor, model: nn.Module) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"adapt: token ids run from {low} to {high} but the model's vocabulary has {vocabulary}"
            f" entries (0 to {vocabulary - 1}). Was the prompt tokenised for another model?"
        )


def _check_labels(
    labels: Tensor, ids: Tensor, mask: Tensor, model: nn.Module, n_past: Sequence[int]
) -> None:
    """Every row needs a token to predict, and must fit the model's context."""
    lengths = mask.sum(1)
    context = context_length(model)
    for row in range(ids.shape[0]):
        length = int(lengths[row])
        if length < 2:
            raise ValueError(
                f"adapt: prompt {row} has {length} token{'s' * (length != 1)}, so there is nothing"
                " to predict. Give at least two tokens."
            )
        if context is not None and n_past[row] + length > context:
            raise ValueError(
                f"adapt: prompt {row} has {n_past[row] + length} tokens but the model's context is"
                f" {context}. Shorten it."
            )
    kept = labels[:, 1:] != IGNORE_INDEX
    masked_out = (~kept.any(1)).nonzero().flatten().tolist()
    if masked_out:
        raise ValueError(
            f"adapt: labels mask out every token of prompt {masked_out[0]}, so there is nothing to"
            " learn from. Pass labels with at least one kept token after the first."
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocabulary))
    if bool(wrong.any()):
        raise ValueError(
            f"adapt: labels has value {int(labels[wrong][0])}; labels are token ids below"
            f" {vocabulary}, or {IGNORE_INDEX} to leave a token out."
        )


def context_length(model: nn.Module) -> int | None:
    """Longest prompt that the model's configuration allows, None if it does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return None


def pad_rows(rows: Sequence[Tensor], pad_value: int, side: str = "left") -> tuple[Tensor, Tensor]:
    """Stack 1-D rows of different lengths; return (N, T) and the (N, T) int64 mask."""
    T = max(row.numel() for row in rows)
    out = torch.full((len(rows), T), pad_value, dtype=rows[0].dtype, device=rows[0].device)
    mask = torch.zeros((len(rows), T), dtype=torch.int64, device=rows[0].device)
    for n, row in enumerate(rows):
        span = slice(T - row.numel(), T) if side == "left" else slice(0, row.numel())
        out[n, span] = row
        mask[n, span] = 1
    return out, mask
