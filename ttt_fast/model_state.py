"""The state of a model that is adapted: who holds its weights, its modes, its gradient flags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ttt_fast.session import Engine


class _Hold:
    """Who holds a model's weights. Kept on both, so that all are collected together."""

    def __init__(self, owner: Any = None) -> None:
        self.owner = owner

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hold:
        # A copy of the model has weights of its own, which nobody holds.
        return _Hold()

    def __reduce__(self) -> tuple[type[_Hold], tuple[()]]:
        return _Hold, ()


def hold(model: nn.Module, owner: Any) -> None:
    """Note that a session or an adaptation holds the model's weights."""
    mark = _Hold(owner)
    for each in _marked(model):
        vars(each)["_ttt_fast_hold"] = mark


def holder(model: nn.Module) -> Any:
    """The session or adaptation that holds the model's weights, None if all are free."""
    for each in _marked(model):
        owner = getattr(vars(each).get("_ttt_fast_hold"), "owner", None)
        if owner is not None:
            return owner
    return None


def release(model: nn.Module) -> None:
    """Forget who holds the model."""
    for each in _marked(model):
        vars(each).pop("_ttt_fast_hold", None)


def _marked(model: nn.Module) -> Iterator[nn.Module | Tensor]:
    yield model
    # Another model may have them, too: one that wraps this one, as peft's do.
    yield from model.parameters()


def require_free(model: nn.Module) -> None:
    """Raise if a session or an adaptation holds the model's weights."""
    owner = holder(model)
    if owner is not None:
        raise RuntimeError(
            f"adapt: the model is held by {owner!r}. Restore or merge that one first "
            "(adapted.restore(), or leave its `with` block)."
        )


@contextmanager
def evaluating(model: nn.Module, dropout: bool = False) -> Iterator[None]:
    """Eval mode (train mode with ``dropout``) for every module; each gets its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        # Only what changes: to set hundreds of flags takes a percent of a short step.
        if any(flag != dropout for _, flag in flags):
            model.train(dropout)
        yield
    finally:
        for module, flag in flags:
            if module.training != flag:
                module.training = flag


@contextmanager
def training(model: nn.Module, engine: Engine, dropout: bool = False) -> Iterator[None]:
    """The state in which a step runs: eval mode, gradients for the selected parameters only.

    Gradient flags, stored gradients, module modes and the random state are afterwards as they were
    found.
    """
    found = [(param, param.requires_grad, param.grad) for param in model.parameters()]
    selected = {id(selection.param) for selection in engine.selections}
    devices = sorted({p.device.index for p, _, _ in found if p.device.type == "cuda"})
    try:
        for param, _, _ in found:
            param.grad = None
            if param.dtype.is_floating_point:
                param.requires_grad_(id(param) in selected)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            evaluating(model, dropout=dropout),
            torch.random.fork_rng(devices, enabled=dropout),
        ):
            yield
    finally:
        for param, requires_grad, grad in found:
            if param.dtype.is_floating_point:
                param.requires_grad_(requires_grad)
            param.grad = grad
