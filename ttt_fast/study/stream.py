"""Dynamic evaluation: each segment of a text is scored, and then trained on.

A segment is scored behind all of the text before it, by weights that have taken k steps on each
earlier segment; a step minimises that same loss. (Krause et al., 2018, with plain SGD or AdamW, and
the text so far as the context.) So the score of a segment is the loss of its first step before the
update, and costs nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ttt_fast.adaptation import Adaptation
from ttt_fast.batch import IGNORE_INDEX, Batch, complete_batch, pad_rows
from ttt_fast.conditions import finite
from ttt_fast.session import Session
from ttt_fast.study.grid import Setting
from ttt_fast.study.scoring import segment_result, segments
from ttt_fast.study.trajectories import Point, SideBySide, State, distance


def stream_states(
    trainer: SideBySide,
    texts: Sequence[Tensor],
    settings: Sequence[Setting],
    steps: Sequence[int],
    size: int,
    on_step: Callable[[int], None],
    delta_norm: bool = True,
) -> Iterator[State]:
    """Trajectory n is text n with setting n; each number of steps a segment is one of its own.

    The state of step 0 comes when the first gradient is known; its scores are for others to say.

    Args:
        trainer: of the scope, with the engine; for a single text and setting if that is "dense".
        texts: ids (T,) each.
        settings: one each.
        steps: numbers of steps on each segment, ascending.
        size: tokens of a segment.
        on_step: told how many steps were taken since it was told last.
        delta_norm: measure it, at the end of the texts.
    """
    configs = [replace(trainer.config, **setting.as_dict()) for setting in settings]
    for number, k in enumerate(k for k in steps if k > 0):
        shows_start = number == 0 and 0 in steps
        try:
            with trainer.begin_pairs(configs, tokens_a_step(texts, size)) as session:
                if shows_start:
                    whole = _rows(texts, range(len(texts)), [0] * len(texts))
                    before = session.loss(whole).tolist()
                nlls = walk(session, texts, size, k, on_step)
                adapted = session.end()
            with adapted:
                points = _points(adapted, session, texts, size, k, delta_norm)
                if shows_start:
                    norms = adapted.grad_norms[:, 0].tolist()
                    yield State(0, [_unadapted(*each) for each in zip(before, norms, strict=True)])
                scores = [
                    segment_result(each, text.numel(), size)
                    for each, text in zip(nlls, texts, strict=True)
                ]
                yield State(k, points, scores)
        except BaseException:
            # It may have come between two lines, while nobody else would have restored.
            trainer.restore()
            raise


def tokens_a_step(texts: Sequence[Tensor], size: int) -> int:
    """Tokens that a step on the longest text sees, the mean over its segments."""
    ends = [end for _, end in segments(max(text.numel() for text in texts), size)]
    return -(-sum(ends) // len(ends))


def walk(
    session: Session,
    texts: Sequence[Tensor],
    size: int,
    k: int,
    on_step: Callable[[int], None],
    context: int | None = None,
) -> list[list[float]]:
    """Score every segment of every text, and take k steps on it.

    Args:
        session: text n is delta n's.
        texts: ids (T,) each; the first token of a text is not predicted.
        size: tokens of a segment.
        k: steps on each segment; with 0 they are only scored.
        on_step: told how many steps were taken since it was told last.
        context: tokens that the model sees at once, more than a segment; default the whole text.

    Returns:
        negative log-likelihood of each segment of each text, summed over its tokens.
    """
    spans = [segments(text.numel(), size) for text in texts]
    counts, losses = [], []
    for n in range(max(len(each) for each in spans)):
        deltas = [delta for delta, each in enumerate(spans) if n < len(each)]
        ends = [spans[delta][n][1] for delta in deltas]
        begins = [0 if context is None else max(0, end - context) for end in ends]
        rows = [texts[d][a:b] for d, a, b in zip(deltas, begins, ends, strict=True)]
        firsts = [n * size - begin for begin in begins]
        batch = complete_batch(_rows(rows, deltas, firsts), session.model, session.n_deltas)
        counts.append((batch.labels != IGNORE_INDEX).sum(1).tolist())
        parts = session.parts(batch)
        losses.append(session.loss(batch) if k == 0 else session.step_parts(parts).losses)
        for _ in range(1, k):
            session.step_parts(parts)
        on_step(k * len(deltas))
    # Read at the end: every look waits for the device.
    mean = session.config.reduction == "mean"
    found: list[list[float]] = [[] for _ in texts]
    for kept, values in zip(counts, torch.stack(losses).tolist(), strict=True):
        going_on = [delta for delta, each in enumerate(spans) if len(found[delta]) < len(each)]
        for delta, count in zip(going_on, kept, strict=True):
            found[delta].append(values[delta] * count if mean else values[delta])
    return found


def _rows(rows: Sequence[Tensor], deltas: Sequence[int], firsts: Sequence[int]) -> Batch:
    """A row for each of these deltas; what comes before its first token to learn is context."""
    ids, mask = pad_rows(rows, 0, side="right")
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    for row, first in zip(labels, firsts, strict=True):
        row[:first] = IGNORE_INDEX
    return Batch(ids, labels, attention_mask=mask, delta_index=torch.tensor(list(deltas)))


def _unadapted(loss: float, norm: float) -> Point:
    # A first gradient that is not finite belongs to the first step, not to the original weights.
    return Point(finite(loss), finite(norm), 0.0, 1.0)


def _points(
    adapted: Adaptation,
    session: Session,
    texts: Sequence[Tensor],
    size: int,
    k: int,
    delta_norm: bool,
) -> list[Point]:
    """The ends of all trajectories."""
    last = adapted.loss(list(texts)).tolist()
    norms: list[float | None] = [None] * len(texts)
    if delta_norm:
        together = session.engine.together
        norms = adapted.delta_norm().tolist() if together else [distance(session.engine)]
    return [
        _point(adapted, delta, k * len(segments(text.numel(), size)), last[delta], norms[delta])
        for delta, text in enumerate(texts)
    ]


def _point(
    adapted: Adaptation, delta: int, n_steps: int, last: float, delta_norm: float | None
) -> Point:
    losses, grad_norms = adapted.losses[delta, :n_steps], adapted.grad_norms[delta, :n_steps]
    # The update after the first gradient that is not finite was not made, nor any behind it.
    bad = (~(losses.isfinite() & grad_norms.isfinite())).nonzero().flatten().tolist()
    loss = finite(last)
    diverged_at = bad[0] + 1 if bad else n_steps if loss is None else None
    return Point(
        loss if diverged_at is None else None,
        finite(grad_norms[-1]),
        finite(delta_norm),
        float(adapted.update_landed[delta]),
        diverged_at,
    )
