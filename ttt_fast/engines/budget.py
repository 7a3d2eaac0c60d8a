"""A memory budget that a run does not fit: the numbers, and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ttt_fast.engines.cost import dense_bytes, factored_bytes, largest
from ttt_fast.engines.policy import Choice
from ttt_fast.engines.work import Workload

# What to offer in place of a larger scope.
_SCOPES = ("ffn", "attention", "query", "norm")


def needed(work: Workload, engine: str, at_once: int = 1) -> dict[str, int]:
    """Peak bytes above the model by use, with so many deltas in a forward where several go."""
    return dense_bytes(work) if engine == "dense" else factored_bytes(work, at_once)


def refusal(
    work: Workload,
    choice: Choice,
    budget: int,
    scoped: Callable[[str], Workload | None],
) -> str | None:
    """Why a run is refused, with what would fit; None if it fits.

    Args:
        work: what was asked for.
        choice: what the policy made of it.
        budget: bytes above the model.
        scoped: the same with another scope; None where there is none.
    """
    engine = choice.engine
    work = replace(work, checkpointing=choice.checkpointing)
    parts = needed(work, engine, choice.deltas_at_once)
    total = sum(parts.values())
    if total <= budget:
        return None
    uses = ", ".join(f"{use} {_size(size)}" for use, size in parts.items() if size)
    deltas = f"{work.deltas} deltas of " if work.deltas > 1 else ""
    how = " with checkpointing" if work.checkpointing else ""
    if work.context:
        how = f" on spans of {work.context} with kv='frozen'{how}"
    found = [*_what_fits(work, engine, budget, scoped)]
    least = "No smaller batch, scope or prompt fits, and no other engine."
    return (
        f"memory_budget={budget} ({_size(budget)}) is too small: {deltas}{work.tokens} tokens and"
        f" {work.steps} steps{how} need {_size(total)} above the model with engine={engine!r}"
        f" ({uses})."
        f" {'What would fit: ' + '; '.join(found) + '.' if found else least}"
    )


def _what_fits(
    work: Workload, engine: str, budget: int, scoped: Callable[[str], Workload | None]
) -> Iterator[str]:
    """Changes that are enough, each on its own."""

    def size(other: Workload, engine: str = engine) -> int:
        return sum(needed(other, engine).values())

    def fits(other: Workload, engine: str = engine) -> bool:
        return size(other, engine) <= budget

    again = replace(work, checkpointing=True)
    if not work.checkpointing and work.blocks and fits(again):
        yield f"checkpointing=True ({_size(size(again))})"
    other = "factored" if engine == "dense" else "dense"
    if (other == "dense" or work.obstacle is None) and fits(work, other):
        yield f"engine={other!r} ({_size(size(work, other))})"
    n = largest(work.deltas, lambda n: fits(replace(work, deltas=n)))
    if 0 < n < work.deltas:
        yield f"{n} prompt{'s' * (n > 1)} at a time ({_size(size(replace(work, deltas=n)))})"
    for scope in _SCOPES:
        smaller = scoped(scope)
        if smaller is not None and smaller.obstacle is None and fits(smaller):
            yield f"scope={scope!r} ({_size(size(smaller))})"
            break
    n = largest(work.tokens, lambda n: fits(_shorter(work, n)))
    if 1 < n < work.tokens:
        yield f"{n} tokens"


def _shorter(work: Workload, n_tokens: int) -> Workload:
    """The work on fewer tokens, of which the first has no label."""
    labels = work.n_labels
    labels = None if labels is None else max(1, min(labels, n_tokens - 1))
    return replace(work, tokens=n_tokens, n_labels=labels)


def _size(number: int) -> str:
    if number >= 2**30:
        return f"{number / 2**30:.2f} GiB"
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.1f} KiB"
