"""How much of an update reaches the weights: a learning-rate sweep seen through the rounding.

In bfloat16 a small step vanishes: the weight that it is added to rounds back to what it was. A
sweep over learning rates then measures rounding. The audit adapts the same model to the same prompt
in every way there is to write an update, and says for each learning rate which share of it landed.

    report = audit(model, input_ids, lrs=(1e-5, 1e-4, 1e-3), steps=10)
    print(report.page())
    report.plot("audit.png")
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ttt_fast.adaptation import Adaptation
from ttt_fast.audit_report import MODES, AuditReport, AuditRow, brief
from ttt_fast.batch import Batch, complete_batch
from ttt_fast.conditions import finite, model_name, versions
from ttt_fast.config import TTTConfig
from ttt_fast.engines.policy import dense_bytes, free_bytes, workload
from ttt_fast.model_state import evaluating
from ttt_fast.rounding import compute_dtype
from ttt_fast.selection import Selection
from ttt_fast.session import DivergedError
from ttt_fast.snapshot import Snapshot
from ttt_fast.trainer import TTTTrainer

__all__ = ["DEFAULT_LRS", "DEFAULT_STEPS", "MODES", "VARIED", "AuditReport", "AuditRow", "audit"]

DEFAULT_LRS = (1e-5, 1e-4, 1e-3, 1e-2)
DEFAULT_STEPS = 10
REFERENCE = "float32"  # the mode
# Settings of TTTConfig that the audit chooses itself.
VARIED = frozenset({"lr"}.union(*(mode.options for mode in MODES.values())))


def audit(
    model: nn.Module,
    input_ids: Tensor,
    *,
    lrs: Sequence[float] = DEFAULT_LRS,
    steps: int = DEFAULT_STEPS,
    modes: Sequence[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> AuditReport:
    """Adapt a model to a prompt in every mode at every learning rate, and measure what landed.

    A mode that diverges is a row that says so. Whatever happens, also on Ctrl-C, the model is
    bitwise what it was.

    Args:
        model: a Hugging Face causal language model, in the dtype that is to be audited.
        input_ids: the prompt's ids, (T,) or (N, T); several rows train one delta.
        lrs: learning rates.
        steps: steps at each of them.
        modes: keys of :data:`MODES`; default all that make a difference in this dtype, the float32
            copy of the model only if it fits into memory.
        progress: show a bar.
        **options: further fields of :class:`TTTConfig`: momentum, weight_decay, max_grad_norm,
            scope, optimizer, ...; not those that a mode sets (engine, rounding, accumulate).

    Raises:
        ValueError: bad input; nothing has run.
    """
    ids = torch.atleast_2d(torch.as_tensor(input_ids))
    complete_batch(Batch(ids), model, 1)  # refuses what cannot be adapted to
    lrs = _checked_lrs(lrs)
    config = _checked_config(options, steps)
    trainer = TTTTrainer(model, config)  # refuses scopes that select nothing
    views = [selection.view() for selection in trainer.selections]
    narrow = any(torch.finfo(view.dtype).bits == 16 for view in views)
    names, notes = _chosen_modes(modes, narrow, config)
    if modes is None and REFERENCE in names:
        lacking = _lacks_memory(trainer, ids.numel())
        if lacking is not None:
            names.remove(REFERENCE)
            notes.append(f"No float32 reference: {lacking}.")
    snapshot = Snapshot(trainer.selections, module=model)
    originals = {s.name: o for s, o in zip(trainer.selections, snapshot.originals, strict=True)}
    rows: list[AuditRow] = []
    with tqdm(total=len(names) * len(lrs) * steps, disable=not progress, unit="step") as bar:
        for name in names:
            adapted_model = copy.deepcopy(model).float() if name == REFERENCE else model
            for lr in lrs:
                bar.set_description(f"{MODES[name].label:>13}, lr {brief(lr)}")
                done = bar.n
                chosen = replace(config, **MODES[name].options, lr=lr)
                rows.append(_audit_one(adapted_model, ids, name, chosen, originals, bar))
                bar.update(done + steps - bar.n)  # what a run that diverged left out
            del adapted_model
    rows.sort(key=lambda row: (row.lr, list(MODES).index(row.mode)))
    return AuditReport(
        rows, _conditions(model, ids, config, views, lrs), notes, restored=snapshot.verify()
    )


# ---------------------------------------------------------------------------- one run


def _audit_one(
    model: nn.Module,
    ids: Tensor,
    name: str,
    config: TTTConfig,
    originals: dict[str, Tensor],
    bar: tqdm,
) -> AuditRow:
    """One mode at one learning rate."""
    trainer = None
    try:
        try:
            trainer = TTTTrainer(model, config)
            adapted = trainer.adapt(
                ids, deltas="shared", on_step=None if bar.disable else lambda report: bar.update()
            )
        except ValueError as error:
            if not MODES[name].refusable:
                raise
            return AuditRow(name, config.lr, refused=" ".join(str(error).split()))
        with adapted:
            return _measure(adapted, name, trainer.selections, ids, originals)
    except DivergedError as error:
        return AuditRow(name, config.lr, diverged_at=error.step)
    except BaseException:
        # Ctrl-C may have come between adapt and the `with` block, where nobody else restores.
        if trainer is not None:
            trainer.restore()
        raise


def _measure(
    adapted: Adaptation,
    name: str,
    selections: Sequence[Selection],
    ids: Tensor,
    originals: dict[str, Tensor],
) -> AuditRow:
    """The row of an adaptation that came to its end."""
    config, model = adapted.config, adapted.model
    loss_after = finite(adapted.loss()[0])
    changed = activation_change = None
    if config.engine == "factored":
        moved = adapted.delta_norm()[0]
    else:
        changed, moved = _compare(selections, originals)
    if name == REFERENCE:
        activation_change = _activation_change(model, ids, selections, originals)
    return AuditRow(
        name,
        config.lr,
        update_landed=finite(adapted.update_landed[0]),
        changed=changed,
        moved=finite(moved),
        activation_change=finite(activation_change),
        grad_norm=finite(adapted.grad_norms[0, 0]),
        loss_before=finite(adapted.losses[0, 0]),
        loss_after=loss_after,
        diverged_at=config.steps + 1 if loss_after is None else None,
    )


def _chunks(selection: Selection, original: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of (now − original, original) in the compute type, small whatever the parameter is."""
    now = selection.view().detach()
    if now.dim() == 0:
        now, original = now[None], original[None]
    wide = torch.promote_types(compute_dtype(now.dtype), compute_dtype(original.dtype))
    n_rows = max(1, (1 << 22) * now.shape[0] // max(1, now.numel()))
    for new, old in zip(now.split(n_rows), original.split(n_rows), strict=True):
        old = old.to(now.dtype).to(wide)
        yield new.to(wide) - old, old


@torch.no_grad()
def _compare(selections: Sequence[Selection], originals: dict[str, Tensor]) -> tuple[float, float]:
    """Share of the selected weights that differ from the originals, and their distance."""
    counts, squares, numel = [], [], 0
    for selection in selections:
        numel += selection.numel
        for difference, _ in _chunks(selection, originals[selection.name]):
            counts.append(torch.count_nonzero(difference).cpu())
            squares.append(torch.linalg.vector_norm(difference).double().square().cpu())
    return int(torch.stack(counts).sum()) / numel, math.sqrt(float(torch.stack(squares).sum()))


@torch.no_grad()
def _activation_change(
    model: nn.Module, ids: Tensor, selections: Sequence[Selection], originals: dict[str, Tensor]
) -> float | None:
    """Median over the whole adapted nn.Linear of ‖(W − W_0) x‖ / ‖W_0 x‖, x what the layer sees."""
    selected = {id(s.param): s for s in selections if s.rows is None}
    ratios, handles = [], []

    def measure(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        selection = selected[id(module.weight)]
        changes, outputs = [], []
        for difference, original in _chunks(selection, originals[selection.name]):
            changes.append(torch.linalg.vector_norm(F.linear(inputs[0], difference)))
            outputs.append(torch.linalg.vector_norm(F.linear(inputs[0], original)))
        change, size = (torch.linalg.vector_norm(torch.stack(n)) for n in (changes, outputs))
        ratios.append(float(change / size))

    try:
        for module in model.modules():
            if isinstance(module, nn.Linear) and id(module.weight) in selected:
                handles.append(module.register_forward_hook(measure))
        with evaluating(model):
            model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return statistics.median(ratios) if ratios else None


# ---------------------------------------------------------------------------- what runs


def _checked_lrs(lrs: Sequence[float]) -> list[float]:
    """Ascending and without repetitions."""
    if not lrs or not all(math.isfinite(lr) and lr > 0 for lr in lrs):
        raise ValueError(f"audit: lrs={list(lrs)!r}; give at least one, all finite and > 0.")
    return sorted(set(map(float, lrs)))


def _checked_config(options: dict[str, Any], steps: int) -> TTTConfig:
    wrong = sorted(VARIED & set(options))
    if wrong:
        raise ValueError(
            f"audit: {', '.join(wrong)} is what the audit varies; choose with modes=... and lrs=..."
        )
    unknown = sorted(set(options) - {f.name for f in fields(TTTConfig)})
    if unknown:
        raise ValueError(f"audit: {', '.join(unknown)} is not a setting of TTTConfig.")
    if options.get("snapshot", "device") != "device":
        raise ValueError("audit: accumulate='delta' needs snapshot='device'; leave it out.")
    if steps < 1:
        raise ValueError(f"audit: steps={steps}; it must be at least 1.")
    return TTTConfig(steps=steps, **options)


def _chosen_modes(
    modes: Sequence[str] | None, narrow: bool, config: TTTConfig
) -> tuple[list[str], list[str]]:
    """Modes to run in their order, and a note on each that cannot."""
    unknown = sorted(set(modes or ()) - set(MODES))
    if unknown or modes is not None and not modes:
        raise ValueError(
            f"audit: modes={list(modes)!r}; use some of {', '.join(map(repr, MODES))}."
        )
    telling = [name for name, mode in MODES.items() if narrow or not mode.narrow]
    wanted = telling if modes is None else modes
    names = [name for name in MODES if name in wanted]
    notes = []
    for name in list(names):
        try:
            replace(config, **MODES[name].options)
        except ValueError as error:
            if modes is not None:
                raise
            names.remove(name)
            notes.append(f"{MODES[name].label} was left out: {error}")
    return names, notes


def _lacks_memory(trainer: TTTTrainer, n_tokens: int) -> str | None:
    """Why a float32 copy of the model would not fit; None if it does."""
    model, selections, config = trainer.model, trainer.selections, trainer.config
    work = workload(model, selections, config, 1, n_tokens)
    copied = 4 * sum(param.numel() for param in model.parameters())
    needed = copied + sum(dense_bytes(replace(work, dtype=REFERENCE)).values())
    free = config.memory_budget or free_bytes(selections[0].param.device)
    if free is None:
        return "the system does not tell how much memory is free; name the mode to run it anyway"
    if needed > free:
        return f"it would need about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
    return None


def _conditions(
    model: nn.Module,
    ids: Tensor,
    config: TTTConfig,
    views: Sequence[Tensor],
    lrs: Sequence[float],
) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in VARIED}
    plain = {
        name: value if isinstance(value, int | float | str | None) else repr(value)
        for name, value in settings.items()
    }
    return plain | {
        "model": model_name(model),
        "dtype": "+".join(sorted({str(view.dtype).removeprefix("torch.") for view in views})),
        "device": str(views[0].device),
        "threads": torch.get_num_threads(),
        "lrs": list(lrs),
        "input_ids": ids.tolist(),
        "tokens": ids.numel(),
        "selected_parameters": sum(view.numel() for view in views),
        "versions": versions(),
    }
