"""Prompts as users have them: text, ids, a tokenizer's output; and the batch that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttt_fast.batch import EMPTY_PROMPT, Batch, complete_batch, pad_rows

_TOKEN_FIELDS = ("labels", "attention_mask", "position_ids", "token_weights")


def prompt_batch(
    model: nn.Module,
    tokenizer: Any,
    prompt: Any,
    *,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
    deltas: str | None = None,
) -> Batch:
    """The complete batch of what :meth:`TTTTrainer.adapt` is given, checked before anything else.

    Args:
        model: what it is for.
        tokenizer: None if there is none.
        prompt: as in ``adapt``, as all that follow.
        labels: (N, T).
        attention_mask: (N, T).
        position_ids: (N, T).
        token_weights: (N, T).
        row_weights: (N,).
        deltas: "independent" or "shared".

    Raises:
        TypeError: no prompt.
        ValueError: what cannot be adapted to, in words.
    """
    if deltas not in (None, "independent", "shared"):
        raise ValueError(
            f"adapt: deltas={deltas!r} is unknown; use 'independent' (each prompt adapts on its"
            " own) or 'shared' (all train one delta)."
        )
    rows, extra = as_prompts(prompt, tokenizer)
    if len(rows) > 1 and deltas is None:
        raise ValueError(
            f"adapt: got {len(rows)} rows; say deltas='independent' (each adapts on its own) or"
            " deltas='shared' (all train one delta)."
        )
    if any(row.numel() == 0 for row in rows):
        raise ValueError(EMPTY_PROMPT)
    # On the right, where causal attention never looks at it from a token.
    ids, padding = pad_rows(rows, pad_value=0, side="right")
    ragged = bool((padding == 0).any())
    given = {"labels": labels, "attention_mask": attention_mask, "position_ids": position_ids,
             "token_weights": token_weights}  # fmt: skip
    given = {k: extra.get(k) if v is None else v for k, v in given.items()}
    for name, tensor in given.items():
        if tensor is not None and ragged:
            raise ValueError(
                f"adapt: {name} cannot go with prompts of different lengths. Pad them and give"
                f" an attention_mask, or drop {name}."
            )
        if isinstance(tensor, Tensor) and tensor.dim() == 1:
            given[name] = tensor[None]
    if ragged:
        given["attention_mask"] = padding
    independent = deltas == "independent"
    batch = Batch(
        input_ids=ids,
        row_weights=row_weights,
        delta_index=torch.arange(len(rows)) if independent else None,
        **given,
    )
    return complete_batch(batch, model, len(rows) if independent else 1)


def as_prompts(prompt: Any, tokenizer: Any = None) -> tuple[list[Tensor], Mapping[str, Tensor]]:
    """Turn a user's prompt into rows of ids and the other fields of a tokenizer's output.

    Accepts text or a list of texts (with a tokenizer), a tensor (T,) or (N, T), lists of ids, a
    list of tensors, and the mapping that a tokenizer returns.

    Returns:
        rows, each (T,) int64, and further fields ("attention_mask", ...) of a mapping.
    """
    extra: Mapping[str, Tensor] = {}
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            raise ValueError(f"adapt: got a mapping with {sorted(prompt)}; it needs 'input_ids'.")
        fields_given = {
            name: _field(name, prompt[name]) for name in _TOKEN_FIELDS if name in prompt
        }
        extra = {name: value for name, value in fields_given.items() if value is not None}
        prompt = prompt["input_ids"]
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, np.ndarray):
        prompt = torch.as_tensor(prompt)
    if isinstance(prompt, Tensor):
        if prompt.dim() not in (1, 2):
            raise ValueError(
                f"adapt: input_ids has shape {tuple(prompt.shape)}; it must be (tokens,) or (rows,"
                " tokens)."
            )
        prompt = list(prompt if prompt.dim() == 2 else prompt[None])
    if not isinstance(prompt, Sequence):
        raise TypeError(
            f"adapt: got {type(prompt).__name__}; give token ids, a tokenizer's output, or text"
            " with a tokenizer."
        )
    if len(prompt) == 0:
        raise ValueError(EMPTY_PROMPT)
    if all(isinstance(item, str) for item in prompt):
        if tokenizer is None:
            raise ValueError(
                "adapt: got text but the trainer has no tokenizer. Pass TTTTrainer(model, config, "
                "tokenizer=tokenizer), or token ids."
            )
        return [torch.tensor(tokenizer(item)["input_ids"]) for item in prompt], extra
    if all(isinstance(item, int) for item in prompt):
        return [torch.tensor(prompt)], extra
    rows = [torch.as_tensor(item) for item in prompt]
    for n, row in enumerate(rows):
        if row.dim() == 2 and row.shape[0] == 1:
            rows[n] = row[0]
        elif row.dim() != 1:
            raise ValueError(
                f"adapt: prompt {n} has shape {tuple(row.shape)}; each prompt of a list is"
                " (tokens,)."
            )
    return rows, extra


def _field(name: str, value: Any) -> Tensor | None:
    """A tokenizer's field as a tensor; None for masks of ones, ragged like the ids."""
    if isinstance(value, Sequence) and len({np.size(row) for row in value}) > 1:
        if name == "attention_mask" and all(np.all(row) for row in value):
            return None
        raise ValueError(
            f"adapt: {name} has rows of different lengths; pad them (tokenizer(..., padding=True))."
        )
    return torch.as_tensor(np.asarray(value) if isinstance(value, Sequence) else value)
