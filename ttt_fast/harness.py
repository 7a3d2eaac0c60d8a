r"""A model type of lm-evaluation-harness that adapts to each request's context, and restores.

    ttt-fast lm-eval run --model ttt_fast --tasks hellaswag \
        --model_args pretrained=path/or/hub-name,steps=20,lr=1e-3,scope=ffn

The arguments behind ``lm-eval`` are those of the harness's own command, which is what runs: its
version 0.4 finds model types in a table and loads no plugins, so this module has to be imported
first. In Python that is ``import ttt_fast.harness`` before ``lm_eval.simple_evaluate``.

What is scored, and how text becomes tokens, is the harness's own Hugging Face model; only the
weights are others. A context is adapted to once, whatever the number of its options.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm

from ttt_fast.batch import IGNORE_INDEX, context_length, pad_rows
from ttt_fast.config import TTTConfig
from ttt_fast.study.scoring import segments
from ttt_fast.study.stream import walk
from ttt_fast.trainer import TTTTrainer

logger = logging.getLogger(__name__)

Context = tuple[str, tuple[int, ...]]  # its text and its tokens

# The harness has a `backend` of its own: whether a model is an encoder and a decoder.
_SETTINGS = {option.name for option in fields(TTTConfig)} - {"backend"}


@register_model("ttt_fast")
class TTTLM(HFLM):
    """The harness's Hugging Face model, with the weights adapted to the context of each request.

    Args:
        pretrained: as in ``hf``: a folder, a name on the hub, or a model.
        leave_one_out: number of examples in front of each question (``--num_fewshot``); the weights
            then learn from tasks of them, each example in turn behind all others, many rows and one
            delta. 0 adapts to the context as a text.
        fewshot_delimiter: what stands between examples, the task's own; for ``leave_one_out``.
        segment_tokens: texts whose likelihood is asked for as a whole (perplexities) have no
            context: they go by in segments of so many tokens, each scored behind the text before
            it, and then trained on.
        **options: fields of :class:`TTTConfig` (steps, lr, scope, ...; "none" stands for None), and
            the options of ``hf`` (dtype, batch_size, ...).

    Raises:
        ValueError: a setting that cannot be, or a model that is no causal language model.
    """

    def __init__(
        self,
        pretrained: Any,
        leave_one_out: int = 0,
        fewshot_delimiter: str = "\n\n",
        segment_tokens: int = 64,
        **options: Any,
    ) -> None:
        settings = {name: options.pop(name) for name in _SETTINGS & set(options)}
        none = {name for name, value in settings.items() if str(value).lower() == "none"}
        config = TTTConfig(**(settings | dict.fromkeys(none)))
        if leave_one_out < 0 or segment_tokens < 2:
            raise ValueError(
                f"ttt_fast: leave_one_out={leave_one_out}, segment_tokens={segment_tokens}; they"
                " are a number of examples, at least 0, and of tokens, at least 2."
            )
        if config.kv != "exact":
            raise ValueError(
                f"ttt_fast: kv={config.kv!r}, but likelihoods are computed with keys and values of"
                " the adapted weights. Use kv=exact."
            )
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise ValueError(f"ttt_fast: {pretrained} is no causal language model; use hf.")
        if self.batch_size_per_gpu == "auto":
            # A batch is the options of one context here; nothing is to be tried out for them.
            self.batch_size_per_gpu = self.max_batch_size
        self._shots, self._delimiter, self._size = leave_one_out, fewshot_delimiter, segment_tokens
        self._trainer = TTTTrainer(self.model, config)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: of the model, and how it was adapted."""
        settings = {name: _plain(value) for name, value in asdict(self._trainer.config).items()}
        own = {"leave_one_out": self._shots, "segment_tokens": self._size}
        return super().get_model_info() | {"ttt_fast": settings | own}

    # ------------------------------------------------------------------ requests with a context

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, each with the weights adapted to its context."""
        score = super()._loglikelihood_tokens

        def answers(numbers: list[int]) -> list[tuple[float, bool]]:
            own = [requests[number] for number in numbers]
            return score(own, disable_tqdm=True, override_bs=override_bs)

        contexts = [(context, tuple(ids)) for (context, _), ids, _ in requests]
        return self._by_context(contexts, answers, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each with the weights adapted to its context."""
        generate = super().generate_until

        def answers(numbers: list[int]) -> list[str]:
            return generate([requests[number] for number in numbers], disable_tqdm=True)

        texts = [request.args[0] for request in requests]
        contexts = [(text, tuple(self.tok_encode(text))) for text in texts]
        return self._by_context(contexts, answers, disable_tqdm)

    def _by_context(
        self,
        contexts: Sequence[Context],
        answers_of: Callable[[list[int]], list[Any]],
        disable_tqdm: bool,
    ) -> list[Any]:
        """The answers to requests with these contexts, asked for together where they are equal."""
        together: dict[Context, list[int]] = {}
        for number, context in enumerate(contexts):
            together.setdefault(context, []).append(number)
        groups = list(together.values())
        answers: list[Any] = [None] * len(contexts)
        with closing(self._adapted(list(together), disable_tqdm)) as indices:
            for n in indices:
                for number, answer in zip(groups[n], answers_of(groups[n]), strict=True):
                    answers[number] = answer
        return answers

    def _adapted(self, contexts: Sequence[Context], disable_tqdm: bool) -> Iterator[int]:
        """Number of each context, in any order, while the model has the weights adapted to it."""
        # Nothing follows a single token, so there is nothing to learn from it.
        short = [n for n, (_, ids) in enumerate(contexts) if len(ids) < 2]
        if short and self._trainer.config.steps:
            logger.warning("%d requests have no context; nothing is adapted for them", len(short))
        plain = range(len(contexts)) if self._trainer.config.steps == 0 else short
        yield from plain
        numbers = sorted(set(range(len(contexts))) - set(plain))
        bar = tqdm(
            total=len(numbers), disable=disable_tqdm or self.rank != 0, desc="Adapting to contexts"
        )
        adapted = self._one_by_one if self._shots else self._side_by_side
        with bar, closing(adapted([contexts[n] for n in numbers])) as indices:
            for index in indices:
                yield numbers[index]
                bar.update()

    def _side_by_side(self, contexts: Sequence[Context]) -> Iterator[int]:
        """Contexts adapt as texts, as many together as the memory allows."""
        rows = [torch.tensor(self._fitting(ids)) for _, ids in contexts]
        if not rows:
            return
        with closing(self._trainer.adapt_batches(rows)) as batches:
            for numbers, adapted in batches:
                for delta, n in enumerate(numbers):
                    with adapted.weights_of(delta):
                        yield n

    def _one_by_one(self, contexts: Sequence[Context]) -> Iterator[int]:
        """The examples in each context are tasks: many rows, one delta."""
        for n, (context, _) in enumerate(contexts):
            ids, labels, mask = self._left_out_tasks(context)
            with self._trainer.adapt(ids, labels=labels, attention_mask=mask, deltas="shared"):
                yield n

    def _left_out_tasks(self, context: str) -> tuple[Tensor, Tensor, Tensor]:
        """A row for each example, last behind all others; only its own tokens are learned.

        Raises:
            ValueError: the context has fewer examples.
        """
        parts = context.split(self._delimiter)
        if len(parts) <= self._shots:
            raise ValueError(
                f"ttt_fast: leave_one_out={self._shots}, but a context has {len(parts)} parts"
                f" between {self._delimiter!r}: {context[:80]!r}... Give the number of"
                " --num_fewshot, and the task's fewshot_delimiter."
            )
        first = len(parts) - 1 - self._shots
        rows, labels = [], []
        for left_out in range(first, len(parts) - 1):
            others = parts[:left_out] + parts[left_out + 1 : -1]
            before = "".join(part + self._delimiter for part in others)
            ids = self._fitting(self.tok_encode(before + parts[left_out]))
            n_learned = len(ids)
            if before:
                n_learned = min(n_learned, len(self._encode_pair(before, parts[left_out])[1]))
            rows.append(torch.tensor(ids))
            labels.append(rows[-1].clone())
            labels[-1][: len(ids) - n_learned] = IGNORE_INDEX
        ids, mask = pad_rows(rows, 0, side="right")
        return ids, pad_rows(labels, IGNORE_INDEX, side="right")[0], mask

    def _fitting(self, ids: Sequence[int]) -> list[int]:
        """The last tokens, as many as the model takes; the harness does so to what it scores."""
        longest = self._longest()
        if len(ids) > longest:
            logger.warning("a context of %d tokens is cut to its last %d", len(ids), longest)
        return list(ids)[-longest:]

    def _longest(self) -> int:
        return min(self.max_length, context_length(self.model) or self.max_length)

    # ------------------------------------------------------------------ texts without one

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts: each segment is scored, and then trained on."""
        texts = [
            torch.tensor([self.prefix_token_id, *self.tok_encode(request.args[0])])
            for request in requests
        ]
        longest, size = self._longest(), min(self._size, self._longest() - 1)
        config = self._trainer.config
        n_segments = max(len(segments(text.numel(), size)) for text in texts)
        # The engine is chosen for as many steps as the longest text takes.
        trainer = TTTTrainer(self.model, replace(config, steps=config.steps * n_segments))
        answers = []
        for text, request in zip(
            tqdm(texts, disable=disable_tqdm or self.rank != 0, desc="Streaming texts"),
            requests,
            strict=True,
        ):
            nll = 0.0
            if text.numel() > 1:
                with trainer.begin(1, min(longest, text.numel())) as session:
                    (nlls,) = walk(
                        session, [text], size, config.steps, lambda taken: None, context=longest
                    )
                nll = sum(nlls)
            answers.append(-nll)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, -nll)
        return answers


def _plain(value: Any) -> Any:
    """JSON-able."""
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def main(arguments: Sequence[str]) -> int:
    """Run the harness's own command line, which knows the model type now."""
    from lm_eval.__main__ import cli_evaluate

    found = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = found
    return 0
