"""Score a task with what a model computes now: likelihoods and greedy answers, many rows at once.

Rows are padded on the left, so that what is scored stands at the right end of all of them: a model
then computes the logits of those few places only. While deltas are active, equally many rows belong
to each, in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from ttt_fast.batch import Batch, forward_arguments, pad_rows
from ttt_fast.conditions import finite
from ttt_fast.model_state import evaluating
from ttt_fast.rounding import compute_dtype
from ttt_fast.study.tasks import Encoded, Task


def score(
    model: nn.Module,
    task: Task,
    examples: Sequence[Encoded],
    tokenizer: Any,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """What a task measures, for each example; row n belongs to delta n where there are deltas.

    Args:
        model: as it computes now.
        task: of the examples.
        examples: equally many continuations each.
        tokenizer: to decode answers.
        max_new_tokens: of an answer, where the task has answers.

    Returns:
        for each example the fields of its result: ``likelihoods`` (log-likelihoods of the options),
        ``nll`` (a token, of a text's second half, or of all segments of a text and with it
        ``segments``, of each), ``answer`` (judged, of what was generated), and ``correct``,
        metric -> bool. None stands for numbers that are not finite.
    """
    if task.segment_tokens:
        return _score_segments(model, examples, task.segment_tokens)
    results: list[dict[str, Any]] = [{"correct": {}} for _ in examples]
    if examples and examples[0].continuations:
        for result, encoded, sums in zip(
            results, examples, log_likelihoods(model, examples), strict=True
        ):
            if task.halves:
                result["nll"] = finite(-sums[0] / encoded.continuations[0].numel())
                continue
            result["likelihoods"] = [finite(x) for x in sums]
            right = sums[encoded.example.answer_index]
            others = [x for n, x in enumerate(sums) if n != encoded.example.answer_index]
            result["correct"]["likelihood"] = all(right > other for other in others)
    if task.judge is not None:
        prompts = [encoded.prompt for encoded in examples]
        texts = greedy_answers(model, prompts, tokenizer, task, max_new_tokens)
        for result, encoded, text in zip(results, examples, texts, strict=True):
            result["answer"], result["correct"]["generation"] = task.judge(encoded.example, text)
    return results


def _score_segments(
    model: nn.Module, examples: Sequence[Encoded], segment_tokens: int
) -> list[dict[str, Any]]:
    """Whole texts, without a step in between."""
    behind_first = [Encoded(e.example, e.prompt[:1], (e.prompt[1:],)) for e in examples]
    results = []
    for (each,) in token_log_likelihoods(model, behind_first):
        spans = segments(each.numel() + 1, segment_tokens)
        # Entry n is of token n + 1.
        sums = [float(-each[max(0, first - 1) : end - 1].sum()) for first, end in spans]
        results.append(segment_result(sums, each.numel() + 1, segment_tokens))
    return results


def segments(n_tokens: int, size: int) -> list[tuple[int, int]]:
    """First token of each segment of a text, and the one behind it; the last may be shorter."""
    return [(first, min(first + size, n_tokens)) for first in range(0, n_tokens, size)]


def segment_result(nlls: Sequence[float], n_tokens: int, size: int) -> dict[str, Any]:
    """The fields of a text's result from the negative log-likelihood of each segment (its sum)."""
    # Nothing comes before the first token, so it is not predicted.
    counts = [end - max(1, first) for first, end in segments(n_tokens, size)]
    return {
        "correct": {},
        "nll": finite(math.fsum(nlls) / sum(counts)),
        "segments": [finite(nll / count) for nll, count in zip(nlls, counts, strict=True)],
    }


def log_likelihoods(model: nn.Module, examples: Sequence[Encoded]) -> list[list[float]]:
    """Σ log p of the tokens of every continuation behind its prompt, for each example."""
    return [[float(x.sum()) for x in each] for each in token_log_likelihoods(model, examples)]


@torch.no_grad()
def token_log_likelihoods(model: nn.Module, examples: Sequence[Encoded]) -> list[list[Tensor]]:
    """Log p of each token of every continuation behind its prompt, float64, for each example."""
    device = model.get_input_embeddings().weight.device
    pairs = [(e.prompt, continuation) for e in examples for continuation in e.continuations]
    ids, mask = pad_rows([torch.cat(pair).to(device) for pair in pairs], 0)
    longest = max(continuation.numel() for _, continuation in pairs)
    arguments = forward_arguments(model)
    inputs = _inputs(ids, mask, arguments)
    if "logits_to_keep" in arguments:
        inputs["logits_to_keep"] = longest + 1
    with evaluating(model):
        logits = model(**inputs).logits[:, -(longest + 1) : -1]
    targets = ids[:, -longest:]
    # One row at a time: a float32 copy of all logits may be larger than everything else.
    chosen = torch.stack([
        row.to(compute_dtype(row.dtype)).log_softmax(-1).gather(-1, target[:, None])[:, 0]
        for row, target in zip(logits, targets, strict=True)
    ])  # fmt: skip
    each = [
        row[longest - continuation.numel() :].double()
        for row, (_, continuation) in zip(chosen, pairs, strict=True)
    ]
    n = len(examples[0].continuations)
    return [each[first : first + n] for first in range(0, len(each), n)]


def _inputs(ids: Tensor, mask: Tensor, arguments: frozenset[str]) -> dict[str, Any]:
    # What lies left of a row would shift the positions of models that count them from the left.
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    batch = Batch(ids, attention_mask=mask, position_ids=positions)
    return batch.model_inputs(arguments)


@torch.no_grad()
def greedy_answers(
    model: nn.Module, prompts: Sequence[Tensor], tokenizer: Any, task: Task, max_new_tokens: int
) -> list[str]:
    """Text that greedy decoding continues every prompt with, until the task has its answer."""
    device = model.get_input_embeddings().weight.device
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in known if token is not None)
    ids, mask = pad_rows([prompt.to(device) for prompt in prompts], pad)
    start = ids.shape[1]

    def text_of(row: Tensor) -> str:
        return tokenizer.decode(row[start:], skip_special_tokens=True)

    stop = StoppingCriteriaList([_Judged(lambda row: task.complete(text_of(row)))])
    with evaluating(model):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # The configurations of chat models set them, and greedy decoding warns of each.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            stopping_criteria=stop,
        )
    return [text_of(row) for row in output]


class _Judged(StoppingCriteria):
    """Ends each row when what it says is decided."""

    def __init__(self, decided: Callable[[Tensor], bool]) -> None:
        self._decided = decided

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = [self._decided(row) for row in input_ids]
        return torch.tensor(done, device=input_ids.device)
