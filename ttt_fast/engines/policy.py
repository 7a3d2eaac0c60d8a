"""Which engine adapts, and the reason.

Nothing here touches a tensor's values. :func:`workload` reads shapes from a model (one on the meta
device will do), :func:`choose` compares what the engines cost (:mod:`ttt_fast.engines.cost`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ttt_fast.config import TTTConfig
from ttt_fast.engines.cost import (
    deltas_at_once,
    dense_bytes,
    dense_ms,
    factored_bytes,
    factored_ms,
)
from ttt_fast.engines.factorable import unsupported
from ttt_fast.engines.head import caps_logits, expects_no_logits
from ttt_fast.engines.machine import Machine
from ttt_fast.engines.shapes import (
    attention_width,
    crossed_blocks,
    hidden_width,
    kv_width,
    layers_of,
)
from ttt_fast.engines.work import Workload
from ttt_fast.scope import is_compiled
from ttt_fast.selection import Selection
from ttt_fast.span_cache import attends_apart

ENGINES = ("auto", "factored", "dense")


# ---------------------------------------------------------------------------- the work


def workload(
    model: nn.Module,
    selections: Sequence[Selection],
    config: TTTConfig,
    n_deltas: int,
    n_tokens: int,
    available_bytes: int | None = None,
) -> Workload:
    """Read the numbers of a workload off a model; weights are not looked at (meta will do).

    Args:
        model: the model.
        selections: what adapts.
        config: settings.
        n_deltas: D.
        n_tokens: T, tokens of a delta's prompts, the longest where they differ.
        available_bytes: memory above the model, None for no limit; see :func:`free_bytes`.
    """
    rows = {id(s.param): s for s in selections}
    dtypes = [str(s.param.dtype).removeprefix("torch.") for s in selections]
    groups = [config, *(config.for_group(group) for group in config.param_groups)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # As for the engines: of a compiled model, and where torch's bits are wanted, the own code runs.
    stock = config.rounding == "torch" or is_compiled(model)
    work = Workload(
        layers=layers_of(model, rows, config.backend, stock),
        tokens=n_tokens,
        steps=config.steps,
        deltas=n_deltas,
        dtype=max(set(dtypes), key=dtypes.count),
        optimizer=config.optimizer,
        momentum=any(group.momentum > 0 for group in groups),
        accumulate_delta=config.accumulate == "delta",
        rounding=config.rounding,
        vocabulary=head.weight.shape[0] if hasattr(head, "weight") else 0,
        loss_in_head=not stock and expects_no_logits(model),
        capped=caps_logits(model),
        attention_width=attention_width(model),
        hidden_width=hidden_width(model),
        kv_width=kv_width(model),
        joined=config.dropout or not attends_apart(model),
        blocks=0 if is_compiled(model) else crossed_blocks(model, rows),
        checkpointing=config.checkpointing,
        obstacle=obstacle(model, selections, config),
        available_bytes=available_bytes,
    )
    return on_prompts(work, config, n_tokens)


def on_prompts(work: Workload, config: TTTConfig, n_tokens: int, n_rows: int = 1) -> Workload:
    """The work with prompts of another length.

    Args:
        work: what was read off a model.
        config: settings: with kv="frozen" a step sees spans of the prompts.
        n_tokens: of all prompts of a delta.
        n_rows: how many prompts these are.
    """
    if config.kv == "exact":
        return replace(work, tokens=n_tokens, n_rows=n_rows)
    tokens = n_rows * config.tokens_of_step(-(-n_tokens // n_rows))
    return replace(work, tokens=tokens, n_rows=n_rows, context=n_tokens)


def obstacle(model: nn.Module, selections: Sequence[Selection], config: TTTConfig) -> str | None:
    """Why the factored engine cannot do this, in words; None if it can.

    It keeps gradients as products of recorded tensors, so the update has to be linear in the
    gradient, and every adapted weight has to belong to a module whose gradient is such a product.
    """
    if config.optimizer != "sgd":
        return f"{config.optimizer} is not linear in the gradient"
    if config.accumulate == "delta":
        return "accumulate='delta' keeps a dense delta"
    if config.rounding != "nearest":
        return f"rounding={config.rounding!r} is about weights that are written"
    if config.snapshot == "undo":
        return "snapshot='undo' logs weights that are written"
    reasons = unsupported(model, selections)
    return reasons[0] if reasons else None


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory that can be had on a device without pushing others out; None if it cannot be told."""
    device = torch.device(device)
    if device.type == "cuda":
        # What torch's allocator holds without using it can be had, too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


# ---------------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Choice:
    """The engine, and why.

    Attributes:
        engine: "factored" or "dense".
        reason: one line.
        predicted_ms: engine -> milliseconds of one step of one delta, the mean over all steps and
            deltas, with their shares of snapshot and restore; engines that can do it.
        predicted_bytes: engine -> peak memory above the model, likewise.
        deltas_at_once: deltas that the factored engine can train side by side in the memory.
        checkpointing: decoder layers are computed again in the backward pass.
    """

    engine: str
    reason: str
    predicted_ms: dict[str, float]
    predicted_bytes: dict[str, int]
    deltas_at_once: int = 1
    checkpointing: bool = False

    def fits(self, work: Workload) -> bool:
        """Whether the engine is predicted to need no more bytes than there are for it."""
        return self.predicted_bytes[self.engine] <= work.limit(self.engine)


def choose(work: Workload, machine: Machine, engine: str = "auto") -> Choice:
    """Choose the engine that is predicted to be faster among those that fit into the memory.

    Where none fits and ``work.checkpointing`` is "auto", layers are computed again if that helps.

    Args:
        work: what is to be done.
        machine: what it is done on.
        engine: "auto", or the one that the user asked for.

    Raises:
        ValueError: ``engine`` is unknown, or "factored" for what it cannot do.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; use one of {', '.join(ENGINES)}.")
    if engine == "factored" and work.obstacle is not None:
        raise ValueError(
            f"engine='factored': {work.obstacle}. Use engine='dense', or 'auto', which chooses it."
        )
    if work.checkpointing != "auto":
        return _choose(work, machine, engine)
    whole = _choose(replace(work, checkpointing=False), machine, engine)
    if whole.fits(work) or not work.blocks:
        return whole
    again = _choose(replace(work, checkpointing=True), machine, engine)
    smaller = again.predicted_bytes[again.engine] < whole.predicted_bytes[whole.engine]
    return again if smaller else whole


def _choose(work: Workload, machine: Machine, engine: str) -> Choice:
    """:func:`choose` with checkpointing or without."""
    at_once = max(1, deltas_at_once(work))
    ms = {"dense": dense_ms(work, machine)}
    sizes = {"dense": sum(dense_bytes(work).values())}
    if work.obstacle is None:
        ms["factored"] = factored_ms(work, machine, at_once)
        sizes["factored"] = sum(factored_bytes(work, at_once).values())
    if engine == "auto":
        chosen, reason = _decide(work, ms, sizes)
    else:
        chosen, reason = engine, f"{engine}: asked for ({_milliseconds(ms[engine])} predicted)"
    again = work.checkpointing is True
    if again:
        reason += "; layers are computed again in the backward pass"
    return Choice(chosen, reason, ms, sizes, at_once, again)


def _decide(work: Workload, ms: dict[str, float], sizes: dict[str, int]) -> tuple[str, str]:
    """The engine that is faster among those that fit, and why."""
    if work.obstacle is not None:
        return "dense", f"dense: {work.obstacle}"
    fits = {name: size <= work.limit(name) for name, size in sizes.items()}
    if fits["dense"] != fits["factored"]:
        chosen, other = ("dense", "factored") if fits["dense"] else ("factored", "dense")
        return chosen, (
            f"{chosen}: it fits with {_gib(sizes[chosen])}; {other} would need"
            f" {_gib(sizes[other])} of the {_gib(work.available_bytes)} there are"
        )
    if not fits["dense"]:
        chosen = min(sizes, key=sizes.__getitem__)
        return chosen, (
            f"{chosen}: neither engine fits into {_gib(work.available_bytes)}, this one needs"
            f" {_gib(sizes[chosen])}"
        )
    chosen, other = sorted(ms, key=lambda name: (ms[name], name))
    text = (
        f"{chosen}: {_milliseconds(ms[chosen])} a step predicted, {_milliseconds(ms[other])} for"
        f" {other}"
    )
    if chosen == "dense":
        text += f" (rank {work.steps * work.tokens} at the last of {work.steps} steps)"
    elif work.deltas > 1:
        text += f" ({work.deltas} deltas share every read of the weights)"
    return chosen, text


def _milliseconds(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.2g} ms"


def _gib(number: int | None) -> str:
    return f"{(number or 0) / 2**30:.2f} GiB"
