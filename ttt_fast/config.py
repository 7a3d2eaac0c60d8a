"""The settings of an adaptation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ttt_fast.backend import BACKENDS
from ttt_fast.ops import ROUNDINGS

Schedule = float | Sequence[float] | Callable[[int], float]

_CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "reduction": ("mean", "sum"),
    "engine": ("auto", "factored", "dense"),
    "accumulate": ("weight", "delta"),
    "rounding": ROUNDINGS,
    "snapshot": ("device", "host", "undo"),
    "backend": ("auto", *BACKENDS),
    "checkpointing": ("auto", True, False),
    "cuda_graph": ("auto", True, False),
    "kv": ("exact", "frozen"),
}
_GROUP_OPTIONS = (
    "lr", "momentum", "dampening", "nesterov", "weight_decay", "decoupled_weight_decay", "betas",
    "eps",
)  # fmt: skip
# What only adapt does; other ways to adapt have batches of their own.
SPAN_OPTIONS = ("kv", "span_tokens", "spans")


@dataclass(frozen=True)
class TTTConfig:
    """Settings of an adaptation; names and meanings follow ``torch.optim``.

    Args:
        steps: gradient steps K.
        lr: step size; a sequence gives one for each step, a function maps the step (from 0) to one.
        momentum: SGD's momentum.
        dampening: SGD's dampening, not applied on the first step.
        nesterov: Nesterov momentum.
        weight_decay: decay coefficient: coupled (L2) for "sgd", decoupled for "adamw".
        decoupled_weight_decay: decouple it for "sgd" too.
        max_grad_norm: clip threshold of the global gradient norm, None for no clipping.
        optimizer: "sgd" or "adamw".
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        scope: which parameters adapt, see :func:`ttt_fast.select_parameters`.
        layers: which decoder layers, e.g. ``"-4:"`` for the last four; None for all.
        param_groups: overrides for some parameters: dicts with "params" (a scope) and any of lr,
            momentum, dampening, nesterov, weight_decay, decoupled_weight_decay, betas, eps. The
            first match counts.
        reduction: a row's loss is the "mean" or the "sum" over its tokens.
        engine: "factored" (the weights are never written, many prompts go at once), "dense" (the
            weights change in place), or "auto", which takes the cheaper one.
        accumulate: "weight", or "delta": keep Δ in float32 and set W = round(W₀ + Δ).
        rounding: "nearest" (one rounding a step), "stochastic" (seeded), or "torch" (bitwise what
            stock torch does).
        snapshot: where the original weights are kept: "device", "host", or "undo" (sparse log,
            16-bit weights).
        seed: of stochastic rounding, of dropout and of spans.
        dropout: leave dropout on during steps (the model runs in eval mode otherwise).
        max_batch_tokens: tokens, padding included, that go through the model at once where several
            deltas do; None for no bound.
        pad_to_multiple_of: let prompts of ``adapt`` go through the model padded on the right to a
            multiple of so many tokens, so that those of several lengths share a CUDA graph (and the
            kernels that are made for a shape). The padding is masked: equal up to rounding. Default
            None, no padding.
        memory_budget: bytes above the model that a run may need at its peak, by the formulas of
            :mod:`ttt_fast.engines.cost`: the engine and how many deltas go at once are chosen to
            fit, and what cannot is refused before it starts. Default None: plan with what the
            device has free, refuse nothing.
        checkpointing: compute decoder layers again in the backward pass: True, False, or "auto";
            "auto" does where the predicted peak does not fit the memory otherwise. Of a layer only
            the input is kept then. Exact, and a third more time.
        cuda_graph: replay the steps of ``adapt`` from a CUDA graph: True, False, or "auto";
            on a CUDA device, from the third prompt of a shape on. With "auto" where it can be done
            (:mod:`ttt_fast.graphs`); True raises and says why it cannot. At most 4 graphs are
            kept, each with the memory that one step needs. Default False: it has not run on a GPU
            yet, only on an emulation.
        check_every: steps between looks at the losses for non-finite values; default 1 on a CPU,
            ``steps`` on a GPU, where a look waits for the device. Whatever it is, nothing is
            written after a step that was not finite.
        kv: keys and values that a token attends to: "exact", those of the adapted weights; or
            "frozen", another objective: before the span that a step sees, those of the unadapted
            weights, computed once (query-only test-time training, :mod:`ttt_fast.frozen_keys`).
            Never chosen automatically.
        span_tokens: with kv="frozen", tokens that a span predicts, each from all before it; the
            span is drawn anew at every step, seeded. A shorter prompt is one span.
        spans: likewise, spans of each prompt at a step; the loss is their mean.
        backend: "auto", or what every op runs in that has it and can, on its tensors: "torch",
            "cpp", "triton" or "cuda".

    Raises:
        ValueError: a value out of range or a combination that cannot work.
    """

    steps: int = 20
    lr: Schedule = 1e-3
    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    max_grad_norm: float | None = 10.0
    optimizer: str = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    scope: Any = "all"
    layers: Any = None
    param_groups: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    reduction: str = "mean"
    engine: str = "auto"
    accumulate: str = "weight"
    rounding: str = "nearest"
    snapshot: str = "device"
    seed: int = 0
    dropout: bool = False
    max_batch_tokens: int | None = 2048
    pad_to_multiple_of: int | None = None
    memory_budget: int | None = None
    checkpointing: bool | str = "auto"
    cuda_graph: bool | str = False
    check_every: int | None = None
    kv: str = "exact"
    span_tokens: int = 128
    spans: int = 1
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"TTTConfig: {name}={value!r} is unknown; use one of "
                    f"{', '.join(map(repr, choices))}."
                )
        for name, least in (("steps", 0), ("check_every", 1), ("span_tokens", 1), ("spans", 1)):
            value = getattr(self, name)
            if name == "check_every" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"TTTConfig: {name}={value!r}; it must be an integer >= {least}.")
        for name in ("max_batch_tokens", "pad_to_multiple_of", "memory_budget"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"TTTConfig: {name}={value!r}; it must be None or at least 1.")
        _check_options(self)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"TTTConfig: max_grad_norm={self.max_grad_norm!r}; it must be > 0, or None to not"
                " clip."
            )
        if self.accumulate == "delta" and self.rounding == "torch":
            raise ValueError(
                "TTTConfig: rounding='torch' is stock torch's update and keeps no delta; "
                "use accumulate='weight' with it."
            )
        if self.accumulate == "delta" and self.snapshot != "device":
            raise ValueError(
                "TTTConfig: accumulate='delta' reads the original weights at every step, so they"
                f" must be on the device; snapshot={self.snapshot!r} is not. Use snapshot='device'."
            )
        if self.engine == "factored":
            self._check_factored()
        for i, group in enumerate(self.param_groups):
            self._check_group(i, group)

    def _check_factored(self) -> None:
        """The factored engine keeps exact SGD and never writes a weight."""
        defaults = {"optimizer": "sgd", "accumulate": "weight", "rounding": "nearest"}
        for name, only in (defaults | {"snapshot": "device"}).items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"TTTConfig: {name}={getattr(self, name)!r} asks for something that only"
                    f" engine='dense' does; engine='factored' needs {name}={only!r} (it is exact"
                    " SGD, writes no weight and so rounds none). Leave one of the two out."
                )

    def _check_group(self, i: int, group: Mapping[str, Any]) -> None:
        unknown = sorted(set(group) - {"params", *_GROUP_OPTIONS})
        if unknown or "params" not in group:
            raise ValueError(
                f"TTTConfig: param_groups[{i}] has keys {sorted(group)}; it needs 'params' (a"
                f" scope) and may have {', '.join(_GROUP_OPTIONS)}."
            )
        try:
            self.for_group(group)
        except ValueError as error:
            reason = str(error).removeprefix("TTTConfig: ")
            raise ValueError(f"TTTConfig: param_groups[{i}]: {reason}") from error

    def for_group(self, group: Mapping[str, Any]) -> TTTConfig:
        """These settings with the overrides of one of ``param_groups``."""
        overrides = {name: value for name, value in group.items() if name != "params"}
        return replace(self, param_groups=(), **overrides)

    def random_stream(self, delta: int, step: int) -> int:
        """Seed of what is random in one step of one delta, below 2⁶³."""
        return ((self.seed * 1_000_003 + delta) * 1_000_003 + step) & ((1 << 63) - 1)

    def span_length(self, n_tokens: int) -> int:
        """Tokens of a span of a prompt with kv="frozen": those that it predicts, and the first."""
        return min(self.span_tokens + 1, n_tokens)

    def tokens_of_step(self, n_tokens: int) -> int:
        """Tokens of a prompt that go through the model in a step."""
        return n_tokens if self.kv == "exact" else self.spans * self.span_length(n_tokens)

    def lr_at(self, step: int) -> float:
        """Step size at a step, counted from 0.

        Raises:
            ValueError: the schedule gives no finite, non-negative number there.
        """
        if callable(self.lr):
            lr = float(self.lr(step))
        elif isinstance(self.lr, Sequence):
            if step >= len(self.lr):
                raise ValueError(
                    f"TTTConfig: lr has {len(self.lr)} values but step {step + 1} was asked for;"
                    " give one for each step."
                )
            lr = float(self.lr[step])
        else:
            lr = float(self.lr)
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"TTTConfig: lr={lr} at step {step + 1}; it must be finite and >= 0.")
        return lr


def _check_options(config: TTTConfig) -> None:
    """Ranges of the options that a parameter group may override."""
    if not callable(config.lr):
        is_list = isinstance(config.lr, Sequence) and not isinstance(config.lr, str)
        if is_list and len(config.lr) < config.steps:
            raise ValueError(
                f"TTTConfig: lr has {len(config.lr)} values for {config.steps} steps; give one for "
                "each step."
            )
        for lr in config.lr if is_list else [config.lr]:
            if not (isinstance(lr, int | float) and math.isfinite(lr) and lr >= 0):
                raise ValueError(f"TTTConfig: lr={lr!r}; it must be finite and >= 0.")
    for name in ("momentum", "weight_decay", "eps"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"TTTConfig: {name}={value!r}; it must be finite and >= 0.")
    if not math.isfinite(config.dampening):
        raise ValueError(f"TTTConfig: dampening={config.dampening!r}; it must be finite.")
    if config.nesterov and (config.momentum <= 0 or config.dampening != 0):
        raise ValueError(
            "TTTConfig: nesterov needs momentum > 0 and dampening = 0; got"
            f" momentum={config.momentum}, dampening={config.dampening}."
        )
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"TTTConfig: betas={config.betas!r}; both must be in [0, 1).")
