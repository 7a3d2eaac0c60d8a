"""The settings that a study tries: the published sweep by default, every axis narrowable."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from ttt_fast.config import TTTConfig


@dataclass(frozen=True)
class Setting:
    """One way to adapt.

    Attributes:
        optimizer: "sgd" or "adamw".
        lr: learning rate.
        weight_decay: as in :class:`TTTConfig`.
        momentum: SGD's; 0 for AdamW, which has none.
        max_grad_norm: clip threshold, None for no clipping.
        scope: which parameters.
    """

    optimizer: str = "sgd"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    max_grad_norm: float | None = None
    scope: str = "all"

    @property
    def words(self) -> str:
        """In one line."""
        clip = "no clip" if self.max_grad_norm is None else f"clip {self.max_grad_norm:g}"
        momentum = f", momentum {self.momentum:g}" if self.optimizer == "sgd" else ""
        return (
            f"{self.optimizer} lr {self.lr:g}, decay {self.weight_decay:g}{momentum}, {clip},"
            f" {self.scope}"
        )

    def config(self, **options: Any) -> TTTConfig:
        """As a configuration of the trainer."""
        return TTTConfig(**(asdict(self) | options))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; :meth:`of` reads it."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Setting:
        """A setting from what :meth:`as_dict` gave."""
        return _known(*(values[f.name] for f in fields(cls)))


@lru_cache(maxsize=4096)
def _known(*values: Any) -> Setting:
    """One object for each setting: a folder of results names the same ones again and again."""
    return Setting(*values)


@dataclass(frozen=True)
class Grid:
    """Every combination of these values, and the steps at which each is looked at.

    The defaults are the sweep of "When Test-Time Training Fails".

    Attributes:
        lr: learning rates.
        steps: numbers of steps; all are points of one trajectory, as long as the largest.
        optimizer: "sgd", "adamw".
        weight_decay: decay coefficients.
        momentum: SGD's.
        max_grad_norm: clip thresholds, None for no clipping.
        scope: which parameters adapt: names or regular expressions.

    Raises:
        ValueError: an axis without a value, or a value that cannot be.
    """

    lr: tuple[float, ...] = (1e-8, 1e-7, 1e-6, 1e-5, 5e-5, 1e-4, 1e-3)
    steps: tuple[int, ...] = (0, 20, 40, 60, 80, 100)
    optimizer: tuple[str, ...] = ("sgd", "adamw")
    weight_decay: tuple[float, ...] = (0.0, 0.01, 0.5)
    momentum: tuple[float, ...] = (0.0, 0.9)
    max_grad_norm: tuple[float | None, ...] = (None, 10.0)
    scope: tuple[str, ...] = ("all", "ffn", "attention")

    def __post_init__(self) -> None:
        for axis in fields(self):
            values = getattr(self, axis.name)
            if isinstance(values, str) or not isinstance(values, Iterable) or not tuple(values):
                raise ValueError(
                    f"study: {axis.name}={values!r}; give at least one value of each axis, in a"
                    " list."
                )
            # As numbers of the type of the default, so that 1 and 1.0 are the same setting.
            kind = {"steps": int, "optimizer": str, "scope": str}.get(axis.name, float)
            read = operator.index if kind is int else kind  # int() would cut 2.5 steps to 2
            optional = axis.name == "max_grad_norm"
            try:
                unique = dict.fromkeys(None if optional and v is None else read(v) for v in values)
            except (TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"study: {axis.name}={list(values)!r}; give {kind.__name__}s."
                ) from None
            ordered = sorted(unique) if axis.name in ("steps", "lr") else unique
            object.__setattr__(self, axis.name, tuple(ordered))
        if self.steps[0] < 0 or self.steps[-1] < 1:
            raise ValueError(
                f"study: steps={list(self.steps)}; give numbers >= 0, one of them at least 1."
            )
        if not all(math.isfinite(lr) and lr > 0 for lr in self.lr):
            raise ValueError(f"study: lr={list(self.lr)}; learning rates are finite and > 0.")
        for setting in self.settings():
            try:
                setting.config(steps=self.steps[-1])
            except ValueError as error:
                raise ValueError(f"study: {str(error).removeprefix('TTTConfig: ')}") from None

    def settings(self) -> list[Setting]:
        """Every combination once; AdamW has no momentum to vary."""
        combinations = itertools.product(
            self.scope, self.optimizer, self.weight_decay, self.momentum, self.max_grad_norm,
            self.lr,
        )  # fmt: skip
        return list(
            dict.fromkeys(
                Setting(optimizer, lr, decay, momentum if optimizer == "sgd" else 0.0, clip, scope)
                for scope, optimizer, decay, momentum, clip, lr in combinations
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {axis.name: list(getattr(self, axis.name)) for axis in fields(self)}
