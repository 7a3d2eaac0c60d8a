"""FusedSGD and FusedAdamW: torch optimizers that clip and update in one pass over memory.

Two changed lines turn an existing loop into a fused one:

    - optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9)
    + optimizer = FusedSGD(params, lr=1e-3, momentum=0.9, max_grad_norm=1.0)
      loss.backward()
    - torch.nn.utils.clip_grad_norm_(params, 1.0)
      optimizer.step()

The norm and the clip coefficient stay tensors on the device; ``.grad`` is read, not rescaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_fast import ops
from ttt_fast.fused_optimizer import FusedOptimizer, Member, Params
from ttt_fast.selection import Selection
from ttt_fast.snapshot import Snapshot

__all__ = ["FusedAdamW", "FusedOptimizer", "FusedSGD", "check_trainer"]


class FusedSGD(FusedOptimizer):
    """``torch.optim.SGD`` and ``clip_grad_norm_`` in one pass over memory.

    The formula is that of :func:`ttt_fast.ops.sgd_`.

    Args:
        params: parameters, (name, parameter) pairs, :class:`ttt_fast.selection.Selection` (where it
            has rows only those are updated and counted in the norm), or dicts of groups with
            options.
        lr: step size. A 1-element tensor works; reading it waits for its device.
        momentum: momentum factor.
        dampening: dampening of momentum.
        weight_decay: L2 coefficient.
        nesterov: use Nesterov momentum.
        decoupled_weight_decay: decay the weight itself instead of adding to the gradient.
        maximize: ascend.
        max_grad_norm: clip threshold of one norm over all groups; None for no clipping.
        clip_params: what else counts in that norm, e.g. ``model.parameters()`` where a part of them
            is optimized; always whole. Gradients of those that are not this optimizer's are clipped
            in place, as ``clip_grad_norm_`` would, for whoever updates them.
        rounding: how 16-bit weights are rounded: "nearest" once a step, "stochastic", or "torch",
            bitwise what ``clip_grad_norm_`` and ``SGD`` with ``foreach=True`` do. (Not at a step
            at which some parameters of a group start and others go on: torch's foreach code then
            multiplies by an unrounded momentum, at all other steps by a bfloat16 one.)
        state_dtype: None for the dtype of each parameter, or torch.float32.
        seed: of stochastic rounding.
        snapshot: :class:`ttt_fast.Snapshot` of these parameters with ``where="undo"``; every step
            logs to it. A copy of the optimizer (deepcopy, pickle) has none.
        backend: "auto", "torch", "cpp", "triton" or "cuda".

    Raises:
        ValueError: an option out of range, worded as torch's.
        TypeError: a complex parameter, a DTensor or FSDP shard.
    """

    _state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        clip_params: Iterable[Tensor | Selection] = (),
        rounding: str = "nearest",
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        snapshot: Snapshot | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, decoupled_weight_decay=decoupled_weight_decay, maximize=maximize,
        )  # fmt: skip
        super().__init__(
            params, defaults, max_grad_norm=max_grad_norm, clip_params=clip_params,
            rounding=rounding, state_dtype=state_dtype, seed=seed, snapshot=snapshot,
            backend=backend,
        )  # fmt: skip

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        if not options["momentum"] >= 0.0:
            raise ValueError(f"Invalid momentum value: {options['momentum']}")
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _age(self, group: dict[str, Any], param: Tensor) -> int:
        started = self.state.get(param, {}).get("momentum_buffer") is not None
        return 1 if started or not group["momentum"] else 0

    def _update(
        self, group: dict[str, Any], members: Sequence[Member], age: int, **common: Any
    ) -> None:
        first_step = age == 0
        buffers = []
        if first_step:
            buffers = [self._new_state(member.weight) for member in members]
        elif group["momentum"]:
            buffers = [self.state[member.param]["momentum_buffer"] for member in members]
        ops.sgd_(
            [member.weight for member in members], [member.grad for member in members], buffers,
            momentum=group["momentum"], dampening=group["dampening"], nesterov=group["nesterov"],
            decoupled_weight_decay=group["decoupled_weight_decay"], first_step=first_step, **common,
        )  # fmt: skip
        for member, buffer in zip(members, buffers, strict=False):
            self.state[member.param]["momentum_buffer"] = buffer


class FusedAdamW(FusedOptimizer):
    """``torch.optim.AdamW`` and ``clip_grad_norm_`` in one pass over memory.

    The formula is that of :func:`ttt_fast.ops.adamw_`.

    Args:
        params: as :class:`FusedSGD`.
        lr: step size. A 1-element tensor works; reading it waits for its device.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay.
        maximize: ascend.
        max_grad_norm: as :class:`FusedSGD`, as all that follow.
        clip_params: what else counts in the norm.
        rounding: "nearest", "stochastic" or "torch".
        state_dtype: None for the dtype of each parameter, or torch.float32.
        seed: of stochastic rounding.
        snapshot: :class:`ttt_fast.Snapshot` of these parameters with ``where="undo"``; every step
            logs to it. A copy of the optimizer (deepcopy, pickle) has none.
        backend: "auto", "torch", "cpp", "triton" or "cuda".

    Raises:
        ValueError: an option out of range, worded as torch's.
        TypeError: a complex parameter, a DTensor or FSDP shard.
    """

    _torch_keys = {
        **FusedOptimizer._torch_keys,
        "amsgrad": False,
        "capturable": False,
        "decoupled_weight_decay": True,
    }
    _state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        clip_params: Iterable[Tensor | Selection] = (),
        rounding: str = "nearest",
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        snapshot: Snapshot | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(
            params, defaults, max_grad_norm=max_grad_norm, clip_params=clip_params,
            rounding=rounding, state_dtype=state_dtype, seed=seed, snapshot=snapshot,
            backend=backend,
        )  # fmt: skip

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        if not options["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {options['eps']}")
        for i, beta in enumerate(options["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if options.get("decoupled_weight_decay") is False and options["weight_decay"]:
            raise ValueError(
                "FusedAdamW decays the weight itself; this group adds the decay to the gradient. "
                "Keep torch.optim.Adam for it, or set decoupled_weight_decay=True in it."
            )

    def _age(self, group: dict[str, Any], param: Tensor) -> int:
        return int(self.state.get(param, {}).get("step", 0))  # a tensor on the CPU: no wait

    def _update(
        self, group: dict[str, Any], members: Sequence[Member], age: int, **common: Any
    ) -> None:
        states = [
            self.state.get(member.param)
            or {
                "step": torch.zeros((), dtype=torch.float32, device="cpu"),
                "exp_avg": self._new_state(member.weight),
                "exp_avg_sq": self._new_state(member.weight),
            }
            for member in members
        ]
        ops.adamw_(
            [member.weight for member in members], [member.grad for member in members],
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states],
            step_index=age + 1, betas=group["betas"], eps=group["eps"], **common,
        )  # fmt: skip
        for member, state in zip(members, states, strict=True):
            state["step"] += 1
            self.state[member.param] = state


def check_trainer(trainer: Any) -> None:
    """Raise if a Hugging Face ``Trainer`` clips gradients that its fused optimizer clips as well.

    Trainer clips unless it has ``TrainingArguments(max_grad_norm=0)`` (the default is 1.0), and
    nothing marks a gradient as clipped, so the optimizer cannot tell by itself: call this before
    ``trainer.train()``. In an Accelerate or plain loop, leave out the call of ``clip_grad_norm_``.

    Args:
        trainer: a ``transformers.Trainer`` made with ``optimizers=(optimizer, scheduler or None)``.

    Raises:
        TypeError: the trainer does not (yet) have a fused optimizer.
        ValueError: both clip.
    """
    optimizer = trainer.optimizer
    while not isinstance(optimizer, FusedOptimizer):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(
                f"check_trainer: trainer.optimizer is {type(trainer.optimizer).__name__}, not a "
                f"fused optimizer. Pass one as Trainer(optimizers=(optimizer, None))."
            )
        optimizer = optimizer.optimizer  # Accelerate's wrapper
    theirs = trainer.args.max_grad_norm
    if optimizer.max_grad_norm is not None and theirs:
        raise ValueError(
            f"Gradients would be clipped twice: TrainingArguments(max_grad_norm={theirs}) and "
            f"{type(optimizer).__name__}(max_grad_norm={optimizer.max_grad_norm}). "
            f"Set TrainingArguments(max_grad_norm=0), or leave max_grad_norm out of the optimizer."
        )
