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
import json
import math
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ttt_fast.batch import Batch, complete_batch
from ttt_fast.config import TTTConfig
from ttt_fast.reference import compute_dtype
from ttt_fast.scope import Selection
from ttt_fast.session import DivergedError, evaluating
from ttt_fast.snapshot import Snapshot
from ttt_fast.trainer import TTTTrainer

__all__ = ["DEFAULT_LRS", "MODES", "AuditReport", "AuditRow", "audit"]

DEFAULT_LRS = (1e-5, 1e-4, 1e-3, 1e-2)
# |Δx|/|y| below which rounding of the activations (2e-3 of an element in bfloat16) drowns what Δ
# does. Measured for bfloat16; float16 has three bits more.
ACTIVATION_LIMITS = {"bfloat16": 7e-4, "float16": 7e-4 / 8}


@dataclass(frozen=True)
class Mode:
    """One way to write an update.

    Attributes:
        label: in the table and the plot.
        options: what it sets in :class:`TTTConfig`.
        words: what it does.
        narrow: makes a difference for 16-bit weights only.
    """

    label: str
    options: dict[str, str]
    words: str
    narrow: bool = False


MODES: dict[str, Mode] = {
    "torch": Mode(
        "stock torch",
        {"engine": "dense", "rounding": "torch"},
        "rounding='torch': clip_grad_norm_ and the optimizer, rounded after every operation",
    ),
    "nearest": Mode(
        "one rounding",
        {"engine": "dense", "rounding": "nearest"},
        "rounding='nearest': the same step in float32, rounded once",
    ),
    "delta": Mode(
        "fp32 delta",
        {"engine": "dense", "accumulate": "delta"},
        "accumulate='delta': a float32 delta; the forward reads round(weight + delta)",
        narrow=True,
    ),
    "stochastic": Mode(
        "stochastic",
        {"engine": "dense", "rounding": "stochastic"},
        "rounding='stochastic': right on average; 'moved' shows the noise that it pays with",
        narrow=True,
    ),
    "factored": Mode(
        "factored",
        {"engine": "factored"},
        "engine='factored': the delta stays beside the weights, nothing is rounded away",
    ),
    "float32": Mode(
        "float32 model",
        {"engine": "dense", "rounding": "nearest"},
        "the reference: a float32 copy of the model",
        narrow=True,
    ),
}
REFERENCE = "float32"


@dataclass(frozen=True)
class AuditRow:
    """One mode at one learning rate. What could not be measured is None.

    Attributes:
        mode: key of :data:`MODES`.
        lr: learning rate.
        update_landed: Σ⟨W' − W, Δ⟩ / Σ‖Δ‖² over the steps, Δ the float32 update and W the weights
            that the forward reads.
        changed: share of the selected weights that differ from the originals after the last step;
            None for the factored engine, which writes no weight.
        moved: ‖W_K − W_0‖ over the selected weights; None likewise.
        activation_change: of the float32 model: ‖(W_K − W_0) x‖ / ‖y‖, the median of its adapted
            linear layers. Below about 7e-4 bfloat16 activations hide the update in every mode.
        grad_norm: of the first step, before clipping.
        loss_before: loss of the prompt before the first step.
        loss_after: loss of the prompt after the last step.
        diverged_at: step whose loss was not finite, counted from 1; one more than there are steps
            where only the last update did it. None if all were finite.
        refused: why this mode cannot run on this model.
    """

    mode: str
    lr: float
    update_landed: float | None = None
    changed: float | None = None
    moved: float | None = None
    activation_change: float | None = None
    grad_norm: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    diverged_at: int | None = None
    refused: str | None = None


@dataclass(frozen=True)
class AuditReport:
    """What :func:`audit` found; ``print(report)`` shows it.

    Attributes:
        rows: by learning rate, then in the order of :data:`MODES`.
        conditions: everything that the numbers depend on, JSON-able.
        notes: what was left out, and why.
        restored: the model's selected weights are, by checksum, what they were.
    """

    rows: list[AuditRow]
    conditions: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    restored: bool = True

    def __str__(self) -> str:
        return self.page()

    def conclusion(self) -> str:
        """One sentence on the first mode that was asked for, stock torch unless left out."""
        mode = min((row.mode for row in self.rows), key=list(MODES).index)
        dtype = self.conditions["dtype"]
        who = f"a stock {dtype} loop" if mode == "torch" else f"{MODES[mode].label} in {dtype}"
        rows = [row for row in self.rows if row.mode == mode]
        shares = {row.lr: row.update_landed for row in rows if row.update_landed is not None}
        if not shares:
            return _sentence(f"{who} took no step that could be measured; see the table.")
        least, low = min(shares.values()), min(shares)
        # More than 1 is rounding, too: steps that reach the next bfloat16 number only just.
        if least >= 0.99 and max(shares.values()) <= 1.01:
            return (
                f"In {dtype} everything lands here: {who} applies at least {_percent(least)} of"
                " its update at every learning rate audited."
            )
        start = f"At lr {_lr(low)} {who} applies {_percent(shares[low])} of its update: "
        swallowed = [lr for lr, share in shares.items() if share < 0.5]
        if not swallowed:
            return f"{start}a part of a sweep over learning rates is rounding."
        if max(swallowed) == max(shares):
            return f"{start}this whole sweep, up to lr {_lr(max(shares))}, measures rounding."
        return (
            f"{start}a sweep over learning rates of {_lr(max(swallowed))} and below measures"
            " rounding."
        )

    def table(self) -> str:
        """One aligned line for each learning rate and mode."""
        heads = ("lr", "mode", "update_landed", "changed", "moved", "loss before", "loss after")
        lines = [(*heads, "")]
        for row in self.rows:
            lines.append((
                _lr(row.lr),
                MODES[row.mode].label,
                _number(row.update_landed, "{:.4f}"),
                "-" if row.changed is None else _percent(row.changed),
                _number(row.moved, "{:.3g}"),
                _loss(row.loss_before),
                _loss(row.loss_after),
                self._remark(row),
            ))  # fmt: skip
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        return "\n".join(
            f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  "
            + "  ".join(f"{cell:>{w}}" for cell, w in zip(line[2:7], widths[2:], strict=True))
            + (f"  {line[7]}" if line[7] else "")
            for line in lines
        )

    def page(self) -> str:
        """The report for people: conclusion, table, what the words mean, the limit."""
        c = self.conditions
        clip = "no clip" if c["max_grad_norm"] is None else f"clip {c['max_grad_norm']:g}"
        decay = f", weight decay {c['weight_decay']:g}" if c["weight_decay"] else ""
        momentum = f" with momentum {c['momentum']:g}" if c["optimizer"] == "sgd" else ""
        lines = [
            self.conclusion(),
            "",
            f"{c['model']} in {c['dtype']} on {c['device']}: {c['steps']} steps of"
            f" {c['optimizer']}{momentum}, {clip}{decay}, on"
            f" {_count(c['selected_parameters'])} parameters (scope {c['scope']}),"
            f" {c['tokens']} tokens",
            "",
            self.table(),
            "",
            "update_landed: share of the intended updates that reached the weights the forward"
            " reads",
            "changed: share of these weights that differ after the last step; moved: how far,"
            " ‖W_K − W_0‖",
        ]
        shown = {row.mode for row in self.rows}
        width = max(len(MODES[mode].label) for mode in shown)
        lines += [f"{m.label:<{width}}  {m.words}" for name, m in MODES.items() if name in shown]
        lines += ["", *filter(None, [self._limit()]), *self.notes]
        if not self.restored:
            lines.append("THE WEIGHTS DID NOT COME BACK")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All numbers, conditions and versions; strict JSON, null for what was not measured."""
        content = {
            "conclusion": self.conclusion(),
            "limit": self._limit(),
            "conditions": self.conditions,
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
            "restored": self.restored,
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def plot(self, path: str | Path) -> None:
        """Draw update_landed and the final loss against the learning rate into a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 6.6), layout="constrained")
        landed, loss = figure.subplots(2, 1, sharex=True)
        for name, look in _LOOKS.items():
            rows = [r for r in self.rows if r.mode == name and r.refused is None]
            if rows:
                _draw(landed, rows, [r.update_landed for r in rows], look, MODES[name].label)
                _draw(loss, rows, [self._drawn_loss(r) for r in rows], look, MODES[name].label)
        landed.set_ylabel("update_landed")
        landed.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
        before = [row.loss_before for row in self.rows if row.loss_before is not None]
        if before:
            loss.axhline(before[0], color="0.4", linewidth=1, linestyle=(0, (1, 3)), zorder=0)
            loss.annotate("before", (0.995, before[0]), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8, color="0.3")  # fmt: skip
        loss.set_ylabel(f"loss of the prompt after {self.conditions['steps']} steps")
        loss.set_xlabel("learning rate" + self._crosses())
        loss.set_xscale("log")
        for axes in (landed, loss):
            axes.grid(True, which="major", color="0.9", linewidth=0.6)
            axes.margins(y=0.08)
        handles, labels = landed.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=150, format="png")

    def _drawn_loss(self, row: AuditRow) -> float | None:
        """None for a loss so large that it would squash all others into one line."""
        if row.loss_after is None or row.loss_after > 3 * row.loss_before:
            return None
        return row.loss_after

    def _crosses(self) -> str:
        gone = any(self._drawn_loss(row) is None for row in self.rows if row.refused is None)
        return "   (× at the top: diverged, or a loss above three times that before)" * gone

    def _remark(self, row: AuditRow) -> str:
        if row.refused is not None:
            return f"refused: {row.refused}"
        if row.diverged_at is None:
            return ""
        if row.diverged_at > self.conditions["steps"]:
            return "diverged after the last step"
        return f"diverged at step {row.diverged_at}"

    def _limit(self) -> str | None:
        """The limit of everything above, with the numbers of this model where there are any."""
        dtype = next((d for d in ACTIVATION_LIMITS if d in self.conditions["dtype"]), None)
        if dtype is None:
            return None
        limit = ACTIVATION_LIMITS[dtype]
        text = (
            f"Limit: where an update changes a layer's output by less than about {_lr(limit)} of it"
            f" (|Δx|/|y|), rounding of {dtype} activations dominates in every mode, element by"
            " element, whatever update_landed says: what comes through is right on average only."
        )
        ratios = {r.lr: r.activation_change for r in self.rows if r.activation_change is not None}
        if ratios:
            numbers = ", ".join(f"{_lr(ratio)} at lr {_lr(lr)}" for lr, ratio in ratios.items())
            text += f" Here, in the median layer of the float32 model, it is {numbers}."
            hidden = [lr for lr, ratio in ratios.items() if ratio < limit]
            if hidden:
                lower = " and lower" if len(hidden) > 1 else ""
                text += f" So lr {_lr(max(hidden))}{lower} is below the limit."
            else:
                text += " All of it is above the limit."
        return text


def audit(
    model: nn.Module,
    input_ids: Tensor,
    *,
    lrs: Sequence[float] = DEFAULT_LRS,
    steps: int = 10,
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
    names, notes = _chosen_modes(modes, narrow, options)
    if modes is None and REFERENCE in names:
        lacking = _lacks_memory(model, views, config)
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
                bar.set_description(f"{MODES[name].label:>13}, lr {_lr(lr)}")
                done = bar.n
                row = _audit_one(adapted_model, ids, name, lr, options, steps, originals, bar)
                rows.append(row)
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
    lr: float,
    options: dict[str, Any],
    steps: int,
    originals: dict[str, Tensor],
    bar: tqdm,
) -> AuditRow:
    """One mode at one learning rate."""
    config = TTTConfig(**(options | MODES[name].options), lr=lr, steps=steps)
    factored = name == "factored"
    trainer = None
    try:
        with _refusable(factored):
            trainer = TTTTrainer(model, config)
            adapted = trainer.adapt(
                ids, deltas="shared", on_step=None if bar.disable else lambda report: bar.update()
            )
        with adapted:
            loss_after = _finite(adapted.loss()[0])
            changed = moved = activation_change = None
            if not factored:
                changed, moved = _compare(trainer.selections, originals)
            if name == REFERENCE:
                activation_change = _activation_change(model, ids, trainer.selections, originals)
            return AuditRow(
                name,
                lr,
                update_landed=_finite(adapted.update_landed[0]),
                changed=changed,
                moved=_finite(moved),
                activation_change=_finite(activation_change),
                grad_norm=_finite(adapted.grad_norms[0, 0]),
                loss_before=_finite(adapted.losses[0, 0]),
                loss_after=loss_after,
                diverged_at=steps + 1 if loss_after is None else None,
            )
    except DivergedError as error:
        return AuditRow(name, lr, diverged_at=error.step)
    except _RefusedError as error:
        return AuditRow(name, lr, refused=str(error))
    except BaseException:
        # Ctrl-C may have come between adapt and the `with` block, where nobody else restores.
        if trainer is not None:
            trainer.restore()
        raise


def _finite(value: Tensor | float | None) -> float | None:
    """As a number that JSON has, None for the others."""
    return float(value) if value is not None and math.isfinite(value) else None


class _RefusedError(Exception):
    """An engine said that it cannot take this model or configuration."""


@contextmanager
def _refusable(possible: bool) -> Iterator[None]:
    """Turn the refusals of an engine that does not take every model into a row of the table."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if not possible:
            raise
        raise _RefusedError(" ".join(str(error).split())) from error


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
    """Median over the adapted linear layers of ‖(W − W_0) x‖ / ‖W_0 x‖, x what the layer sees."""
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
    taken = {"lr"}.union(*(mode.options for mode in MODES.values()))
    wrong = sorted(taken & set(options))
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
    modes: Sequence[str] | None, narrow: bool, options: dict[str, Any]
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
            TTTConfig(**(options | MODES[name].options))
        except ValueError as error:
            if modes is not None:
                raise
            names.remove(name)
            notes.append(f"{MODES[name].label} was left out: {error}")
    return names, notes


def _lacks_memory(model: nn.Module, views: Sequence[Tensor], config: TTTConfig) -> str | None:
    """Why a float32 copy of the model would not fit; None if it does."""
    n_params, n_selected = sum(p.numel() for p in model.parameters()), sum(v.numel() for v in views)
    moments = {"adamw": 2}.get(config.optimizer, int(config.momentum > 0))
    # The copy, a snapshot of what is selected, gradients, moments; half as much again for
    # activations and what the allocator keeps.
    needed = int(1.5 * 4 * (n_params + (2 + moments) * n_selected))
    free = _free_bytes(views[0].device)
    if free is None:
        return "the system does not tell how much memory is free; name the mode to run it anyway"
    if needed > free:
        return f"it would need about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
    return None


def _free_bytes(device: torch.device) -> int | None:
    """Memory that is free, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return free * 1024


def _conditions(
    model: nn.Module,
    ids: Tensor,
    config: TTTConfig,
    views: Sequence[Tensor],
    lrs: Sequence[float],
) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    import transformers

    from ttt_fast import __version__

    settings = {f.name: getattr(config, f.name) for f in fields(config)}
    taken = {"lr"}.union(*(mode.options for mode in MODES.values()))
    plain = {
        name: value if isinstance(value, int | float | str | None) else repr(value)
        for name, value in settings.items()
        if name not in taken
    }
    return plain | {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "dtype": "+".join(sorted({str(view.dtype).removeprefix("torch.") for view in views})),
        "device": str(views[0].device),
        "threads": torch.get_num_threads(),
        "lrs": list(lrs),
        "input_ids": ids.tolist(),
        "tokens": ids.numel(),
        "selected_parameters": sum(view.numel() for view in views),
        "versions": {
            "ttt_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


# ---------------------------------------------------------------------------- how it looks

# Okabe and Ito's colours, which colour-blind people tell apart; markers and dashes for print.
_LOOKS: dict[str, dict[str, Any]] = {
    "torch": dict(color="#000000", marker="o", linestyle="-", markersize=6),
    "nearest": dict(color="#D55E00", marker="s", linestyle="--", markersize=8, fillstyle="none"),
    "delta": dict(color="#0072B2", marker="^", linestyle="-", markersize=6),
    "stochastic": dict(color="#E69F00", marker="D", linestyle=":", markersize=6),
    "factored": dict(color="#009E73", marker="P", linestyle="-.", markersize=7),
    "float32": dict(color="#56B4E9", marker="o", linestyle="--", markersize=10, fillstyle="none"),
}


def _draw(
    axes: Any,
    rows: Sequence[AuditRow],
    values: Sequence[float | None],
    look: dict[str, Any],
    label: str,
) -> None:
    """One mode's line; where there is no value, a cross at the top."""
    lrs = [row.lr for row in rows]
    axes.plot(lrs, [math.nan if v is None else v for v in values], label=label, **look)
    gone = [lr for lr, value in zip(lrs, values, strict=True) if value is None]
    axes.plot(gone, [0.96] * len(gone), "x", color=look["color"], markersize=9,
              transform=axes.get_xaxis_transform())  # fmt: skip


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _lr(lr: float) -> str:
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _percent(share: float) -> str:
    percent = 100 * share
    # Rounded down: 99.96 % is not everything.
    return f"{math.floor(10 * percent) / 10:.1f} %" if percent >= 10 else f"{percent:.2g} %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _loss(value: float | None) -> str:
    return _number(value, "{:.4f}" if value is None or abs(value) < 1e4 else "{:.3g}")


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"
